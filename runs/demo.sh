#!/usr/bin/env bash
# Steps 0 to 3 on a small drawn world with a small CLIP, from image-level labels to a segmentation network.
# At most three minutes on two cores, without a GPU. Results and a report page: output/demo
# Run by `make demo`. Published results are those of VOC 2012, see runs/voc12.sh. docs/shapes.md has the results
# of the drawn world.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # independent steps run at the same time, on one core each

OUTPUT=output/demo
TRAIN_IMAGES=200
VAL_IMAGES=60
ITERATIONS=1500
WORLD=$OUTPUT/world
IMAGES=$WORLD/JPEGImages
TRUTH=$WORLD/SegmentationClass # exact masks, only for evaluation
TRAIN=$WORLD/ImageSets/Segmentation/train.txt
VAL=$WORLD/ImageSets/Segmentation/val.txt

set -m # a process group for each step in the background, which ends with this script
trap 'kill -- $(jobs -p | sed s/^/-/) 2> /dev/null || true' EXIT

rm -rf $OUTPUT
python -m shapes.draw --root $WORLD --train $TRAIN_IMAGES --val $VAL_IMAGES

# Step 0, in the background: labels without annotation. TagCLIP predicts the classes of each image. These labels
# are only for comparison: the steps below use the true labels. Published: mAP 92.8 % (VOC 2007 test).
{
    python pseudo_masks.py --benchmark shapes --image_root $IMAGES --split_file $TRAIN --labels auto \
        --output $OUTPUT/auto_masks
    python classify.py --benchmark shapes --image_root $IMAGES --split_file $TRAIN \
        --output $OUTPUT/auto_masks/tags --json $OUTPUT/tags.json
    python eval_cam.py --benchmark shapes --cam_dir $OUTPUT/auto_masks --cam_type png \
        --split_file $TRAIN --gt_root $TRUTH --json $OUTPUT/auto_masks.json
} > $OUTPUT/step0.log 2>&1 &
STEP0=$!

# Step 1: one class activation map per label, from the images and the names of their classes
python generate_cams.py --benchmark shapes --image_root $IMAGES --split_file $TRAIN --keep_initial \
    --output $OUTPUT/cams

# Step 2b: the dense CRF turns the maps into pseudo masks; pixels of low confidence are 255, ignored in training
python eval_cam_with_crf.py --benchmark shapes --cam_dir $OUTPUT/cams --image_root $IMAGES --split_file $TRAIN \
    --num_workers 1 --output $OUTPUT/pseudo_masks # two processes would compile the CRF twice

# Step 3, in the background: DeepLab is trained on the pseudo masks, then segments new images without labels.
# Published: 71.1 % (VOC 2012 val). Here: a small network from random weights, trained for about a minute.
{
    python -m deeplab.train --config deeplab/configs/shapes.yaml data.root=$WORLD data.train_split=$TRAIN \
        data.label_dir=$OUTPUT/pseudo_masks data.val_split=$VAL data.val_label_dir=$TRUTH \
        "model.blocks=[1, 1, 1, 1]" augment.crop=65 solver.iterations=$ITERATIONS run.output=$OUTPUT/deeplab
    python -m deeplab.test --run $OUTPUT/deeplab --num_workers 2
} > $OUTPUT/step3.log 2>&1 &
STEP3=$!

# Step 2a: mIoU of the initial CAMs and of the CAMs refined by attention affinity. Published: 58.6 % and 70.8 %
# (VOC 2012 train).
python eval_cam.py --benchmark shapes --cam_dir $OUTPUT/cams --cam_type highres \
    --split_file $TRAIN --gt_root $TRUTH --json $OUTPUT/initial.json
python eval_cam.py --benchmark shapes --cam_dir $OUTPUT/cams --cam_type attn_highres \
    --split_file $TRAIN --gt_root $TRUTH --json $OUTPUT/refined.json

# Step 2b: mIoU of the dense CRF on all pixels, published: 75.0 % (VOC 2012 train), and of the pseudo masks
python eval_cam_with_crf.py --benchmark shapes --cam_dir $OUTPUT/cams --image_root $IMAGES --split_file $TRAIN \
    --gt_root $TRUTH --eval_only --num_workers 1 --json $OUTPUT/crf.json
python eval_cam.py --benchmark shapes --cam_dir $OUTPUT/pseudo_masks --cam_type png \
    --split_file $TRAIN --gt_root $TRUTH --json $OUTPUT/pseudo_masks.json

for step in 0 3; do
    job=STEP$step
    wait ${!job} || { cat $OUTPUT/step$step.log; echo "error: step $step failed, see above" >&2; exit 1; }
done
cat $OUTPUT/step0.log $OUTPUT/step3.log

python -m pipeline.report --benchmark shapes --image_root $IMAGES --split_file $TRAIN --gt_root $TRUTH \
    --cam_dir $OUTPUT/cams --pseudo_mask_dir $OUTPUT/pseudo_masks \
    --scores $OUTPUT/initial.json $OUTPUT/refined.json $OUTPUT/crf.json \
    --auto_masks $OUTPUT/auto_masks $OUTPUT/auto_masks/tags/labels.txt --auto_tags $OUTPUT/tags.json \
    --auto_scores $OUTPUT/pseudo_masks.json $OUTPUT/auto_masks.json \
    --network DeepLab $OUTPUT/deeplab/test/masks $OUTPUT/deeplab/test/scores.json \
    --network "DeepLab + CRF" $OUTPUT/deeplab/test/masks_crf $OUTPUT/deeplab/test/scores_crf.json \
    --val_split_file $VAL --output $OUTPUT/report.html --note "DeepLab is a small network with random initial weights, \
trained on the pseudo masks of $TRAIN_IMAGES images for $ITERATIONS iterations of 4 crops, about a minute. Longer training \
scores higher."
