"""One file per way that weights travel: each has a `Writer` and a `Reader` for a `WeightStoreHandle`, and `create`."""
