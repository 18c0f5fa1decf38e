#!/usr/bin/env bash
# Makes /opt/sygaldry/python, the Python that Ray nodes run in: python.sh MINOR_VERSION REQUIREMENTS
# The system's Python when it is of that version, else one that uv gets.
set -euo pipefail
version=$1 requirements=$2
export UV_PYTHON_INSTALL_DIR=/opt/sygaldry/pythons UV_NO_PROGRESS=1 UV_LINK_MODE=copy UV_NO_CACHE=1

# pip only gets uv, of the version and with the digests of the lock.
sed -n '/^uv==/,/[^\\]$/p' "$requirements" >/tmp/uv.txt
python3 -m venv /tmp/uv
/tmp/uv/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps --require-hashes -r /tmp/uv.txt
/tmp/uv/bin/uv venv --quiet --python "$version" --python-preference system /opt/sygaldry/python
mkdir -p "$UV_PYTHON_INSTALL_DIR"
/tmp/uv/bin/uv pip install --quiet --python /opt/sygaldry/python/bin/python --compile-bytecode --require-hashes -r "$requirements"
/tmp/uv/bin/uv pip freeze --quiet --python /opt/sygaldry/python/bin/python >/opt/sygaldry/python/packages.txt

got=$(/opt/sygaldry/python/bin/python -c 'import ray; print(ray.__version__)')
if [[ -n ${RAY_VERSION:-} && $got != "$RAY_VERSION" ]]; then
  echo "requirements.txt has Ray $got, wanted $RAY_VERSION" >&2
  exit 1
fi
