#!/bin/sh
# What to measure in the minutes that an accelerator is at hand: ./scripts/gpu.sh MINUTES OUT [option...]
#
# In this order, each part inside its time and each number on disk as soon as it is known: the machine's peak, the GPU
# tests, benchmarks, then trainings with their audits, the most informative first, until the time is over.
# PARTS names some of them, or "segmentation", networks on label maps of 512 pixels; GAMBESON_DATA is the folder with the
# data, PYTHON the interpreter. Options go to the last two parts: --done FILE passes over the trainings of an earlier
# visit, --tiny rehearses on any machine in seconds.
set -u
minutes=$1 out=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3} PARTS=${PARTS:-machine tests bench training}
export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
began=$(date +%s)
end=$((began + $("$PYTHON" -c "print(int(60 * $minutes))")))

visit() { # PART SHARE [option...]: at most SHARE per cent of what is left, killed 10 seconds later
  part=$1 share=$2
  shift 2
  [ "$part" != "${PARTS##* }" ] || share=97 # the last part has all that is left
  left=$((end - $(date +%s)))
  [ "$left" -gt 0 ] || return 0
  seconds=$((left * share / 100))
  timeout -k 5 $((seconds + 10)) "$PYTHON" "$here/benchmarks/visit_run.py" "$part" --out "$out/visit.jsonl" \
    --seconds "$seconds" "$@" 2>>"$out/errors.txt" || echo "$part ended with code $?"
}

for part in $PARTS; do
  echo "== $part, $((end - $(date +%s))) s left"
  case $part in
  machine) visit machine 25 "$@" ;;
  bench) visit bench 45 "$@" ;;
  segmentation) visit segmentation 45 "$@" ;;
  training) visit training 97 "$@" ;;
  tests)
    timeout -k 5 $(((end - $(date +%s)) * 45 / 100)) "$PYTHON" -m pytest -m gpu "$here/tests/gpu" --rootdir "$here" \
      -c "$here/pyproject.toml" -p no:cacheprovider -n 0 --maxfail=30 --durations=8 --tb=short >"$out/tests.txt" 2>&1 ||
      echo "tests ended with code $?"
    tail -n 25 "$out/tests.txt"
    ;;
  *) echo "no part $part: expected machine, tests, bench, segmentation or training" >&2 && exit 2 ;;
  esac
done
tail -c 1500 "$out/errors.txt" 2>/dev/null
echo "== results, $(($(date +%s) - began)) s"
"$PYTHON" "$here/benchmarks/visit_run.py" table --out "$out/visit.jsonl"
