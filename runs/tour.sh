#!/usr/bin/env bash
# The steps of the demo on more images, and three DeepLab networks, trained without annotation, with image-level
# labels and with pixel labels. About ten minutes on two cores. Results and a report page: output/tour
# Run by `make tour`. Published results are those of VOC 2012, see runs/voc12.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

OUTPUT=output/tour
TRAIN_IMAGES=600
VAL_IMAGES=120
ITERATIONS=1400
WORLD=$OUTPUT/world
IMAGES=$WORLD/JPEGImages
TRUTH=$WORLD/SegmentationClass
TRAIN=$WORLD/ImageSets/Segmentation/train.txt
VAL=$WORLD/ImageSets/Segmentation/val.txt

set -m # a process group for each step in the background, which ends with this script
trap 'kill -- $(jobs -p | sed s/^/-/) 2> /dev/null || true' EXIT

rm -rf $OUTPUT
python -m shapes.draw --root $WORLD --train $TRAIN_IMAGES --val $VAL_IMAGES

# Step 0: labels without annotation (TagCLIP), then steps 1 and 2b with these labels in one command.
# Published: mAP 92.8 % (VOC 2007 test); masks 68.7 % after the CRF (VOC 2012 val).
python pseudo_masks.py --benchmark shapes --image_root $IMAGES --split_file $TRAIN --labels auto \
    --output $OUTPUT/auto_masks --num_workers 2
python classify.py --benchmark shapes --image_root $IMAGES --split_file $TRAIN \
    --output $OUTPUT/auto_masks/tags --json $OUTPUT/tags.json

# Step 1: class activation maps, from the images and their true labels
python generate_cams.py --benchmark shapes --image_root $IMAGES --split_file $TRAIN \
    --output $OUTPUT/cams --keep_initial --num_workers 2

# Step 2a: mIoU before and after refinement by attention affinity. Published: 58.6 % and 70.8 % (VOC 2012 train).
python eval_cam.py --benchmark shapes --cam_dir $OUTPUT/cams --cam_type highres \
    --split_file $TRAIN --gt_root $TRUTH --json $OUTPUT/initial.json
python eval_cam.py --benchmark shapes --cam_dir $OUTPUT/cams --cam_type attn_highres \
    --split_file $TRAIN --gt_root $TRUTH --json $OUTPUT/refined.json

# Step 2b: mIoU of the dense CRF, published: 75.0 % (VOC 2012 train); then pseudo masks with 255 at low confidence
python eval_cam_with_crf.py --benchmark shapes --cam_dir $OUTPUT/cams --image_root $IMAGES \
    --split_file $TRAIN --gt_root $TRUTH --eval_only --json $OUTPUT/crf.json
python eval_cam_with_crf.py --benchmark shapes --cam_dir $OUTPUT/cams --image_root $IMAGES \
    --split_file $TRAIN --output $OUTPUT/pseudo_masks

# mIoU of the pseudo masks from true and from predicted labels, without ignored pixels
for masks in pseudo_masks auto_masks; do
    python eval_cam.py --benchmark shapes --cam_dir $OUTPUT/$masks --cam_type png \
        --split_file $TRAIN --gt_root $TRUTH --json $OUTPUT/$masks.json
done

# Step 3: three DeepLab networks, two at a time on one core each. They are tested with and without a dense CRF.
# Published for image-level labels: 71.1 % (VOC 2012 val).
network() { # NAME MASKS
    export OMP_NUM_THREADS=1
    python -m deeplab.train --config deeplab/configs/shapes.yaml data.root=$WORLD data.train_split=$TRAIN \
        data.label_dir=$2 data.val_split=$VAL data.val_label_dir=$TRUTH \
        solver.iterations=$ITERATIONS run.output=$OUTPUT/$1
    python -m deeplab.test --run $OUTPUT/$1
}
echo 'Two networks are trained at a time; their output appears at the end.'
{ network deeplab_auto $OUTPUT/auto_masks; network deeplab_truth $TRUTH; } > $OUTPUT/networks.log 2>&1 &
network deeplab_pseudo $OUTPUT/pseudo_masks
wait $! || { cat $OUTPUT/networks.log; echo 'error: step 3 failed, see above' >&2; exit 1; }
cat $OUTPUT/networks.log

# For comparison: CAMs and CRF on the val images. They require the true labels of the images; networks do not.
python generate_cams.py --benchmark shapes --image_root $IMAGES --split_file $VAL \
    --output $OUTPUT/val_cams --num_workers 2
python eval_cam.py --benchmark shapes --cam_dir $OUTPUT/val_cams --split_file $VAL \
    --gt_root $TRUTH --json $OUTPUT/val_refined.json
python eval_cam_with_crf.py --benchmark shapes --cam_dir $OUTPUT/val_cams --image_root $IMAGES \
    --split_file $VAL --gt_root $TRUTH --eval_only --json $OUTPUT/val_crf.json

tested() { echo $OUTPUT/$1/test/masks_crf $OUTPUT/$1/test/scores_crf.json; }
python -m pipeline.report --benchmark shapes --image_root $IMAGES --split_file $TRAIN --gt_root $TRUTH \
    --cam_dir $OUTPUT/cams --pseudo_mask_dir $OUTPUT/pseudo_masks \
    --scores $OUTPUT/initial.json $OUTPUT/refined.json $OUTPUT/crf.json \
    --auto_masks $OUTPUT/auto_masks $OUTPUT/auto_masks/tags/labels.txt --auto_tags $OUTPUT/tags.json \
    --auto_scores $OUTPUT/pseudo_masks.json $OUTPUT/auto_masks.json \
    --network "DeepLab + CRF, no annotation" $(tested deeplab_auto) \
    --network "DeepLab + CRF, image labels" $(tested deeplab_pseudo) \
    --network "DeepLab + CRF, pixel labels" $(tested deeplab_truth) \
    --val_split_file $VAL --val_scores $OUTPUT/val_refined.json $OUTPUT/val_crf.json \
    --output $OUTPUT/report.html --note "The three networks differ only in their training masks. Each is narrow, \
has random initial weights and is trained for $ITERATIONS iterations of 4 crops."
