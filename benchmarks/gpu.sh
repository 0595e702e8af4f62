#!/usr/bin/env bash
# Builds, checks and measures fastfuse on a machine with an NVIDIA GPU, without a network.
#
#   bash benchmarks/gpu.sh OUT_DIR [--dry-run] [--full] [--op NAME]... [--wheels DIR]
#
# The machine brings Python with a CUDA build of torch (and its triton), nvcc and a C++ compiler;
# what else is needed comes as wheels, downloaded beforehand for its Python and platform:
#
#   pip download --dest wheels --only-binary=:all: --python-version 3.12 \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
#       --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 \
#       "setuptools>=77" wheel cmake ninja pybind11 rich pytest pytest-benchmark hypothesis \
#       pytest-xdist matplotlib "numpy<2.4"
#
# matplotlib (without it there is no plot) and pytest-xdist (without it tests run one after the
# other) are optional. The quick benchmarks of every op are the default; --full takes longer than
# the rest together, --op verifies and measures only ops of that name. Without --full everything
# ends within 9 minutes, for the steps' limits sum up to that. (The report is written after every
# cell: what was measured before a limit is in it.)
# --dry-run walks what can run without a GPU: the build, and collecting tests and benchmarks.
#
# A step that fails does not stop the others; the exit code then is not zero. OUT_DIR gets gpu.log,
# summary.txt and the benchmarks' report.
set -uo pipefail

usage() {
  echo "usage: bash benchmarks/gpu.sh OUT_DIR [--dry-run] [--full] [--op NAME]... [--wheels DIR]" >&2
  exit 2
}

out="" dry_run=false full=false wheels="" ops=()
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=true ;;
    --full) full=true ;;
    --op) [ $# -gt 1 ] || usage; ops+=(--op "$2"); shift ;;
    --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --wheels) [ $# -gt 1 ] || usage; wheels=$(realpath "$2"); shift ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out="$1" ;;
  esac
  shift
done
[ -n "$out" ] || usage

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out"
out=$(realpath "$out")
log="$out/gpu.log" summary="$out/summary.txt"
: > "$log"
: > "$summary"
cd "$root" || exit 2

python=${PYTHON:-python3}
site="$root/build/gpu-site" # packages of this script alone; the machine's own stay as they are
export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$site/bin:$PATH"
export PYTHONUNBUFFERED=1 COLUMNS=150

failed=0
# step NAME SECONDS COMMAND...
step() {
  local name="$1" limit="$2" began=$SECONDS status line
  shift 2
  printf '\n=== %s: %s\n' "$name" "$*" | tee -a "$log"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  line="ok"
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then line="TIMED OUT after $limit s"
  elif [ "$status" -ne 0 ]; then line="FAILED with exit code $status"; fi
  [ "$status" -eq 0 ] || failed=$((failed + 1))
  printf '%-22s %4d s  %s\n' "$name" $((SECONDS - began)) "$line" | tee -a "$summary"
}

# Names of packages that Python cannot import.
missing() {
  "$python" - "$@" <<'PYTHON'
import importlib.util, sys

modules = {"pytest-benchmark": "pytest_benchmark", "pytest-xdist": "xdist"}
found = (p for p in sys.argv[1:] if importlib.util.find_spec(modules.get(p, p)) is None)
print(*found)
PYTHON
}

install() { # packages that must be there; then those that may be
  local packages
  local needed="setuptools wheel cmake ninja pybind11 rich pytest pytest-benchmark hypothesis"
  read -ra packages <<< "$(missing $needed)"
  # An older setuptools cannot read pyproject.toml.
  "$python" -c 'import setuptools as s; assert int(s.__version__.split(".")[0]) >= 77' 2> /dev/null ||
    packages+=("setuptools>=77")
  local from=(--no-index --find-links "$wheels" --target "$site" --upgrade --quiet)
  if [ ${#packages[@]} -gt 0 ]; then
    [ -n "$wheels" ] || { echo "not installed: ${packages[*]}; give --wheels DIR"; return 1; }
    "$python" -m pip install "${from[@]}" "${packages[@]}" || return 1
  fi
  local optional
  for optional in $(missing matplotlib pytest-xdist); do
    { [ -n "$wheels" ] && "$python" -m pip install "${from[@]}" "$optional"; } ||
      echo "$optional is missing: there will be no plot, or tests run one after the other"
  done
}

# Options that run pytest on several cores, if it can.
parallel() {
  local cores
  cores=$(nproc)
  [ -n "$(missing pytest-xdist)" ] || echo "-n $((cores < 12 ? cores : 12)) --dist worksteal"
}

# Small calls of every op under a tool of compute-sanitizer.
sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then echo "no compute-sanitizer"; return 0; fi
  compute-sanitizer --tool "$1" --error-exitcode 1 --print-limit 20 \
    "$python" -m pytest tests/triton/test_pointwise.py tests/triton/test_tap_sum.py \
    tests/triton/test_upsample_equalize_concat.py -q -x -m "not slow" -k "integers or split"
}

tools() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || echo "no nvidia-smi"
  nvcc --version | tail -n 2 || echo "no nvcc"
  "$python" -c 'import sys, torch; print(sys.version, "torch", torch.__version__)'
}

export -f install missing sanitize
export python site wheels
# The device's kernels alone are built.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1)
case "$capability" in
  8.*) export FASTFUSE_CUDA_ARCHS=80 ;;
  9.*) export FASTFUSE_CUDA_ARCHS=90a ;;
esac
step "packages" 40 bash -c install
tools 2>&1 | tee -a "$log"
step "build" 80 "$python" setup.py build_ext --inplace
step "info" 15 "$python" -m fastfuse info
read -ra jobs <<< "$(parallel)"
if $dry_run; then
  step "collect GPU tests" 60 "$python" -m pytest tests -m gpu --collect-only -q
  step "collect benchmarks" 60 "$python" -m pytest benchmarks -o "python_files=bench_*.py" \
    --quick --device cuda --collect-only -q
else
  step "GPU tests" 70 "$python" -m pytest tests -m gpu -q "${jobs[@]}"
  TRITON_TESTS_ON=device step "Triton tests" 60 \
    "$python" -m pytest tests/triton -m "not slow" -q "${jobs[@]}"
  for tool in memcheck racecheck; do
    TRITON_TESTS_ON=device step "compute-sanitizer $tool" 25 bash -c "sanitize $tool"
  done
  step "verify" 40 "$python" -m fastfuse verify --backend cuda --backend triton "${ops[@]}"
  if $full; then
    step "benchmarks" 3000 "$python" benchmarks/report.py --device cuda --out "$out" "${ops[@]}"
  else
    step "benchmarks" 180 "$python" benchmarks/report.py --device cuda --out "$out" --quick \
      --budget 165 "${ops[@]}"
  fi
  step "CUDA C++ or Triton" 5 "$python" benchmarks/cuda_or_triton.py "$out/report.json"
fi

printf '\n'
cat "$summary"
if [ "$failed" -gt 0 ]; then echo "$failed step(s) failed; see $log" | tee -a "$summary"; exit 1; fi
echo "all steps ended well" | tee -a "$summary"
