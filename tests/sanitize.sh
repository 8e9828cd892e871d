#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary copy and drives the native
# code through every argument, dtype and SIMD variant. Usage: tests/sanitize.sh PYTHON
set -euo pipefail
python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root"/{csrc,ltkernels,setup.py,pyproject.toml,README.md,LICENSE} "$copy"
rm -f "$copy"/ltkernels/_C.so "$copy"/ltkernels/_build.json
cd "$copy"
LTKERNELS_SANITIZE=address,undefined "$python" setup.py --quiet build_ext --inplace

# Python itself is not instrumented: the runtimes are preloaded, and its own leaks at exit are none of our business.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
capabilities=default
for capability in avx2 avx512; do
  # torch obeys ATEN_CPU_CAPABILITY even where the processor lacks the instructions.
  if grep -qw "${capability/avx512/avx512bw}" /proc/cpuinfo; then capabilities+=" $capability"; fi
done
for capability in $capabilities; do
  ATEN_CPU_CAPABILITY=$capability PYTHONPATH="$copy" "$python" "$root/tests/sanitize_driver.py"
done
