#!/usr/bin/env bash
# CLIP-ES on PASCAL VOC 2012, from the data set to DeepLab on val. After an interruption, the same command continues.
# Usage: bash runs/voc12.sh VOC2012_FOLDER [OUTPUT_FOLDER]
#   VOC2012_FOLDER  JPEGImages, Annotations, ImageSets, SegmentationClass and SegmentationClassAug, see docs/data.md
#   OUTPUT_FOLDER   defaults to output/voc12
# Environment: MODEL, INIT (initial weights of DeepLab, see docs/deeplab_weights.md), WORKERS (processes of steps 0 and 1)
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }

VOC=$(realpath "$1")
OUTPUT=$(realpath -m "${2:-$(dirname "$0")/../output/voc12}")
MODEL=${MODEL:-ViT-B/16}
INIT=$(realpath -m "${INIT:-$(dirname "$0")/../weights/deeplabv1_resnet101-imagenet.pth}")
WORKERS=${WORKERS:-1}
IMAGES=$VOC/JPEGImages
TRUTH=$VOC/SegmentationClassAug
cd "$(dirname "$0")/.."
[ -d "$IMAGES" ] || { echo "error: $IMAGES does not exist: give the folder of VOC 2012" >&2; exit 2; }
[ -f "$INIT" ] || { echo "error: $INIT does not exist: see docs/deeplab_weights.md, or INIT=FILE bash runs/voc12.sh" >&2; exit 2; }

# Data: check it and write the split files, voc12/train.txt (1,464 images) and voc12/train_aug.txt (10,582)
python -m voc12.prepare --root "$VOC"

# Step 0 (optional): image-level labels without annotation, by TagCLIP. Published: masks from these labels (CLS-SEG)
# have a mIoU of 68.7 % on val.
# python classify.py --dataset voc2012 --image_root "$IMAGES" --split_file voc12/train_aug.txt --model "$MODEL" \
#     --num_workers "$WORKERS" --output "$OUTPUT/tags" --save_file "$OUTPUT/tags.txt"
# Then add --labels "$OUTPUT/tags.txt" to step 1.

# Step 1: class activation maps of train_aug, which contains train
python generate_cams_voc12.py --image_root "$IMAGES" --split_file voc12/train_aug.txt --model "$MODEL" \
    --num_workers "$WORKERS" --output "$OUTPUT/cams"

# Step 2a: mIoU of the refined CAMs on train. Published: 70.8 %. Do not compare it with train_aug (about 66 %).
python eval_cam.py --benchmark voc12 --cam_dir "$OUTPUT/cams" --split_file voc12/train.txt \
    --gt_root "$TRUTH" --json "$OUTPUT/cams.json"

# Step 2b: mIoU after the dense CRF. Published: 75.0 % on train.
python eval_cam_with_crf.py --benchmark voc12 --cam_dir "$OUTPUT/cams" --image_root "$IMAGES" \
    --split_file voc12/train.txt --gt_root "$TRUTH" --eval_only --json "$OUTPUT/crf.json"
# Step 2b: pseudo masks of train_aug, with 255 where the posterior is below 0.95
python eval_cam_with_crf.py --benchmark voc12 --cam_dir "$OUTPUT/cams" --image_root "$IMAGES" \
    --split_file voc12/train_aug.txt --output "$OUTPUT/pseudo_masks"

# Step 3: DeepLab-v2 on the pseudo masks. Published: 71.1 % on val, 71.4 % on test (ImageNet weights);
# 73.8 % and 73.9 % with COCO weights and deeplab/configs/voc12_clip_es_coco.yaml.
python -m deeplab.train --config deeplab/configs/voc12_clip_es_imagenet.yaml data.root="$VOC" \
    data.label_dir="$OUTPUT/pseudo_masks" model.init="$INIT" run.output="$OUTPUT/deeplab" --resume
python -m deeplab.test --run "$OUTPUT/deeplab" --crf deeplab_published
