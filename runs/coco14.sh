#!/usr/bin/env bash
# CLIP-ES on MS COCO 2014, from the data set to DeepLab on val. After an interruption, the same command continues.
# Usage: bash runs/coco14.sh COCO_FOLDER [OUTPUT_FOLDER]
#   COCO_FOLDER     contains JPEGImages/{train,val}2014, and SegmentationClass or the files to make it from,
#                   annotations/instances_{train,val}2014.json, see docs/data.md
#   OUTPUT_FOLDER   defaults to output/coco14
# Environment: MODEL, INIT (initial weights of DeepLab, see docs/deeplab_weights.md), WORKERS (processes of step 1)
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }

COCO=$(realpath "$1")
OUTPUT=$(realpath -m "${2:-$(dirname "$0")/../output/coco14}")
MODEL=${MODEL:-ViT-B/16}
INIT=$(realpath -m "${INIT:-$(dirname "$0")/../weights/deeplabv1_resnet101-imagenet.pth}")
WORKERS=${WORKERS:-1}
IMAGES=$COCO/JPEGImages/train2014
TRUTH=$COCO/SegmentationClass
cd "$(dirname "$0")/.."
[ -d "$IMAGES" ] || { echo "error: $IMAGES does not exist: give the folder of COCO 2014" >&2; exit 2; }
[ -f "$INIT" ] || { echo "error: $INIT does not exist: see docs/deeplab_weights.md, or INIT=FILE bash runs/coco14.sh" >&2; exit 2; }

# Data: masks from the official annotations if there are none, and the lists coco14/train.txt (82,081 images) and
# coco14/val.txt (40,137)
ANNOTATIONS=()
[ -d "$TRUTH" ] || ANNOTATIONS=(--annotations "$COCO"/annotations/instances_{train,val}2014.json)
python -m coco14.prepare --root "$COCO" "${ANNOTATIONS[@]}"

# Step 1: class activation maps
python generate_cams_coco14.py --image_root "$IMAGES" --split_file coco14/train.txt --model "$MODEL" \
    --num_workers "$WORKERS" --output "$OUTPUT/cams"

# Steps 2a and 2b: mIoU of the refined CAMs, and after the dense CRF. No results were published for train.
python eval_cam.py --benchmark coco14 --cam_dir "$OUTPUT/cams" --split_file coco14/train.txt \
    --gt_root "$TRUTH" --json "$OUTPUT/cams.json"
python eval_cam_with_crf.py --benchmark coco14 --cam_dir "$OUTPUT/cams" --image_root "$IMAGES" \
    --split_file coco14/train.txt --gt_root "$TRUTH" --eval_only --json "$OUTPUT/crf.json"

# Step 2b: pseudo masks, with 255 where the posterior is below 0.95
python eval_cam_with_crf.py --benchmark coco14 --cam_dir "$OUTPUT/cams" --image_root "$IMAGES" \
    --split_file coco14/train.txt --output "$OUTPUT/pseudo_masks"

# Step 3: DeepLab-v2 on the pseudo masks, recipe of LPCAM. Published for CLIP-ES: 45.4 % on val (ImageNet weights).
python -m deeplab.train --config deeplab/configs/coco14.yaml data.root="$COCO" \
    data.label_dir="$OUTPUT/pseudo_masks" model.init="$INIT" run.output="$OUTPUT/deeplab" --resume
python -m deeplab.test --run "$OUTPUT/deeplab" --crf deeplab_published
