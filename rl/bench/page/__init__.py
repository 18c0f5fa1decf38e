"""The report's page: sections of figures and tables, made of nothing but HTML, CSS and SVG.

    Results -> page.<part>.section(s) -> Section(Figure, Table, ...) -> page.html.j2 -> one file

Positions along x are percentages and sizes of text are pixels, so that every figure fits a phone and a sheet of paper
without shrinking its words. Colours are variables of `page.css`, which has them for light and for dark.
"""
