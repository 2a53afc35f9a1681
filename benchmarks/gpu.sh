#!/usr/bin/env bash
# What only a GPU can tell, the most telling first: the tests that need one, and steps of the real shapes, with random
# weights, against the reference path. One that fails, or does not fit, does not stop the others. An hour on one device of
# 80 GB is planned for; it has not been run yet.
#
#     bash benchmarks/gpu.sh [FOLDER]     # a log for each, in benchmarks-gpu by default
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
logs="${1:-benchmarks-gpu}"
mkdir -p "$logs"
export HF_HUB_OFFLINE=1 PYTORCH_ALLOC_CONF=expandable_segments:True

log() { # NAME COMMAND...
  local name="$1"
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$logs/$name.log" || echo "== $name: failed"
}

step() { # NAME SCRIPT OPTIONS...
  local name="$1" script="$2"
  shift 2
  log "$name" python "benchmarks/$script.py" --rounds 1 --repeats 5 "$@"
}

log tests pytest -m gpu
step reconstruction-2b reconstruction --shape qwen2-vl-2b --adapters lora --samples 4 --longest 1300
step reconstruction-2b-by-length reconstruction --shape qwen2-vl-2b --adapters lora --samples 4 --longest 1300 --by-length
step reconstruction-2b-checkpointing reconstruction --shape qwen2-vl-2b --adapters lora --samples 16 --longest 1300 --checkpointing
step contrastive-2b contrastive --shape qwen2-vl-2b --adapters lora --pairs 64 --checkpointing --passes-kept 8
step contrastive-2b-by-length contrastive --shape qwen2-vl-2b --adapters lora --pairs 64 --checkpointing --passes-kept 8 --by-length
# as a recipe trains: a large batch, adapters with DoRA; ours alone
recipe=(--path ours --adapters dora --checkpointing --tokens-per-pass 32768)
for shape in qwen2-vl-2b qwen2.5-vl-3b qwen2-vl-7b; do
  step "reconstruction-$shape" reconstruction --shape "$shape" --samples 64 --longest 1300 "${recipe[@]}"
  step "contrastive-$shape" contrastive --shape "$shape" --pairs 256 --passes-kept 8 "${recipe[@]}"
done
step reconstruction-2b-compiled reconstruction --path ours --shape qwen2-vl-2b --adapters lora --samples 4 --longest 1300 --compile
log encoding python benchmarks/evaluation.py --rounds 1
