#!/usr/bin/env bash
# The four runs that say on MMEB what the miniature cannot: contrastive learning alone, and CoCoA with stage 2's attention
# full, as published, and strict. These three differ in nothing else; contrastive learning alone takes less time than
# they do. Qwen2-VL-2B-Instruct, 8 GPUs of 80 GB, one node.
#
#   TRAIN=/data/MMEB-train EVAL=/data/MMEB-eval OUTPUT=/data/runs bash studies/mmeb.sh
#
# Expected on 8 GPUs that reach 400 TFLOP/s each (40 % of an H100's dense bfloat16 peak): see `python studies/mmeb_hours.py`;
# counted, never run. Started again, it goes on where it was stopped. Fewer GPUs: GPUS=4; the batches stay the same.
#
# One seed is a first look: the table at the end is of its queries, and in the miniature most seeds alone would have had a
# difference resolved by that, some for the cut and some against it. So run several, each in a folder of its own:
#
#   SEED=43 OUTPUT=/data/runs-43 bash studies/mmeb.sh
set -euo pipefail
: "${TRAIN:?folder in the layout of TIGER-Lab/MMEB-train}" "${EVAL:?folder in the layout of TIGER-Lab/MMEB-eval}"
OUTPUT=${OUTPUT:-runs/mmeb} GPUS=${GPUS:-8} SEED=${SEED:-42} BACKBONE=${BACKBONE:-Qwen/Qwen2-VL-2B-Instruct}
recipes=${RECIPES:-$(dirname "$0")/../recipes}

for data in "$TRAIN" "$EVAL"; do # every row read, every image decoded: a bad one is known now, and not after hours
    seen=$OUTPUT/validated$(tr / - <<<"$data")
    [ -e "$seen" ] || cocoa validate "$data" # mend what it finds, or let `train` below have data.on_bad_row=skip
    mkdir -p "$OUTPUT" && touch "$seen"
done

train() { # name, recipe, overrides
    local name=$1 recipe=$2
    shift 2
    accelerate launch --num_processes "$GPUS" -m cocoa.cli train "$recipes/$recipe" backbone="$BACKBONE" \
        data.train="$TRAIN" seed="$SEED" output_dir="$OUTPUT/$name" "$@"
    accelerate launch --num_processes "$GPUS" -m cocoa.cli evaluate "$OUTPUT/$name/final" --data "$EVAL" \
        --output "$OUTPUT/$name/scores"
}

train published cocoa-qwen2-vl-2b.yaml
for layout in full strict; do # stage 1 is the same to the letter: taken over, not trained again
    if [ ! -d "$OUTPUT/$layout/1-joint_reconstruction" ]; then
        mkdir -p "$OUTPUT/$layout"
        rm -rf "$OUTPUT/$layout/1-joint_reconstruction.copy" # of a copy that was stopped
        cp -r "$OUTPUT/published/1-joint_reconstruction" "$OUTPUT/$layout/1-joint_reconstruction.copy"
        mv "$OUTPUT/$layout/1-joint_reconstruction.copy" "$OUTPUT/$layout/1-joint_reconstruction"
    fi
    train "$layout" cocoa-qwen2-vl-2b.yaml stages.eos_bridge.layout="$layout"
done
train contrastive contrastive-bidirectional-qwen2-vl-2b.yaml

# Deciding: published less full. A paired bootstrap over the queries; one seed says nothing of others.
cocoa compare "$OUTPUT"/{full,published,strict,contrastive}/scores
# Has content crossed at all? The page has the captions that `published` rebuilds through EOS, and stage 2's curves.
cocoa report "$OUTPUT"/{contrastive,full,strict,published} --data "$EVAL" --output "$OUTPUT/report.html"
