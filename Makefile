# make setup   the Python environment .venv, once
# make demo    steps 0, 1, 2a, 2b and 3 on a drawn world, and a page of pictures: output/demo/report.html
# make test    lint, and all tests
# make lint, make format, make clean

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Found before .venv comes first on the path: it makes .venv.
PYTHON := $(or $(PYTHON),$(shell command -v python3))
CXX := $(if $(filter default,$(origin CXX)),c++,$(CXX))
export PATH := $(CURDIR)/.venv/bin:$(PATH)

WORLD := output/demo/world
TRAIN := $(WORLD)/ImageSets/Segmentation/train.txt
VAL := $(WORLD)/ImageSets/Segmentation/val.txt
TRUTH := $(WORLD)/SegmentationClass
IMAGES := $(WORLD)/JPEGImages
RESULTS := output/demo
TRAIN_IMAGES := 600
VAL_IMAGES := 120

# What step 3 learns from, with no annotation, image labels, and every pixel labelled; for how many iterations
NETWORKS := deeplab_auto deeplab_pseudo deeplab_truth
deeplab_auto: MASKS := $(RESULTS)/auto_masks
deeplab_pseudo: MASKS := $(RESULTS)/pseudo_masks
deeplab_truth: MASKS := $(TRUTH)
ITERATIONS := 1400
TESTED = $(RESULTS)/$(1)/test/masks_crf $(RESULTS)/$(1)/test/scores_crf.json

.PHONY: help setup demo $(NETWORKS) test lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: .venv/installed

# The stamp is newer than requirements.txt exactly when what is installed is what it lists.
.venv/installed: requirements.txt
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'error: Python 3.10 or newer is needed; name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo 'error: this Python has no venv module; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@command -v $(firstword $(CXX)) > /dev/null || { \
		echo 'error: a C++ compiler is needed (pydensecrf2 is built from source); on Debian and Ubuntu: apt install g++' >&2; exit 1; }
	@$(PYTHON) -c 'import sys, sysconfig, os; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
		echo 'error: the C headers of this Python are needed (pydensecrf2 is built from source); on Debian and Ubuntu: apt install python3-dev' >&2; exit 1; }
	@echo 'Setting up .venv with the packages of requirements.txt: the first time, a download of several GB.'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -r requirements.txt
	@touch $@

demo: setup
	rm -rf $(RESULTS)
	python -m shapes.draw --root $(WORLD) --train $(TRAIN_IMAGES) --val $(VAL_IMAGES)

	# Step 1: class activation maps, from the images and the names of what they contain
	python generate_cams.py --benchmark shapes --img_root $(IMAGES) --split_file $(TRAIN) \
		--cam_out_dir $(RESULTS)/cams --keep_initial --num_workers 2

	# Step 2a: how good are they, before and after refinement by attention affinity?
	python eval_cam.py --dataset shapes --cam_out_dir $(RESULTS)/cams --cam_type highres \
		--split_file $(TRAIN) --gt_root $(TRUTH) --json $(RESULTS)/initial.json
	python eval_cam.py --dataset shapes --cam_out_dir $(RESULTS)/cams --cam_type attn_highres \
		--split_file $(TRAIN) --gt_root $(TRUTH) --json $(RESULTS)/refined.json

	# Step 2b: the dense CRF - its score, then pseudo masks with 255 where it is unsure
	python eval_cam_with_crf.py --dataset shapes --cam_out_dir $(RESULTS)/cams --image_root $(IMAGES) \
		--split_file $(TRAIN) --gt_root $(TRUTH) --eval_only --json $(RESULTS)/crf.json
	python eval_cam_with_crf.py --dataset shapes --cam_out_dir $(RESULTS)/cams --image_root $(IMAGES) \
		--split_file $(TRAIN) --pseudo_mask_save_path $(RESULTS)/pseudo_masks

	# The same without annotation: step 0, CLIP finds the labels, then steps 1 and 2b in one go
	python pseudo_masks.py --benchmark shapes --img_root $(IMAGES) --split_file $(TRAIN) --labels auto \
		--pseudo_mask_save_path $(RESULTS)/auto_masks --num_workers 2
	python classify.py --benchmark shapes --img_root $(IMAGES) --split_file $(TRAIN) \
		--output $(RESULTS)/auto_masks/tags --json $(RESULTS)/tags.json

	# How good are the masks of given labels, and those of found ones?
	python eval_cam.py --dataset shapes --cam_out_dir $(RESULTS)/pseudo_masks --cam_type png \
		--split_file $(TRAIN) --gt_root $(TRUTH) --json $(RESULTS)/pseudo_masks.json
	python eval_cam.py --dataset shapes --cam_out_dir $(RESULTS)/auto_masks --cam_type png \
		--split_file $(TRAIN) --gt_root $(TRUTH) --json $(RESULTS)/auto_masks.json

	# Step 3: DeepLab learns from both and, to compare, from the ground truth, then segments images of which it is
	# told nothing, without and with a dense CRF
	@echo 'Two networks are trained at a time; what they print comes when they are done.'
	$(MAKE) --jobs=2 --output-sync --no-print-directory $(NETWORKS)

	# To compare: CAM and CRF on the same images, though they need to be told what is in these
	python generate_cams.py --benchmark shapes --img_root $(IMAGES) --split_file $(VAL) \
		--cam_out_dir $(RESULTS)/val_cams --num_workers 2
	python eval_cam.py --dataset shapes --cam_out_dir $(RESULTS)/val_cams --split_file $(VAL) \
		--gt_root $(TRUTH) --json $(RESULTS)/val_refined.json
	python eval_cam_with_crf.py --dataset shapes --cam_out_dir $(RESULTS)/val_cams --image_root $(IMAGES) \
		--split_file $(VAL) --gt_root $(TRUTH) --eval_only --json $(RESULTS)/val_crf.json

	python -m pipeline.report --dataset shapes --img_root $(IMAGES) --split_file $(TRAIN) \
		--cam_out_dir $(RESULTS)/cams --pseudo_mask_dir $(RESULTS)/pseudo_masks --gt_root $(TRUTH) \
		--scores $(RESULTS)/initial.json $(RESULTS)/refined.json $(RESULTS)/crf.json \
		--auto_masks $(RESULTS)/auto_masks $(RESULTS)/auto_masks/tags/labels.txt --auto_tags $(RESULTS)/tags.json \
		--auto_scores $(RESULTS)/pseudo_masks.json $(RESULTS)/auto_masks.json \
		--network "DeepLab + CRF, no annotation" $(call TESTED,deeplab_auto) \
		--network "DeepLab + CRF, image labels" $(call TESTED,deeplab_pseudo) \
		--network "DeepLab + CRF, pixel labels" $(call TESTED,deeplab_truth) \
		--val_split_file $(VAL) --val_scores $(RESULTS)/val_refined.json $(RESULTS)/val_crf.json \
		--out $(RESULTS)/report.html
	@echo "Open $(CURDIR)/$(RESULTS)/report.html in a browser."

$(NETWORKS): export OMP_NUM_THREADS := 1
$(NETWORKS):
	python -m deeplab.train --config deeplab/configs/shapes.yaml data.root=$(WORLD) data.train_split=$(TRAIN) \
		data.label_dir=$(MASKS) data.val_split=$(VAL) data.val_label_dir=$(TRUTH) \
		solver.iterations=$(ITERATIONS) run.output=$(RESULTS)/$@
	python -m deeplab.test --run $(RESULTS)/$@

test: setup lint
	python -m pytest -n 2 --dist loadfile

lint: setup
	ruff check .

format: setup
	ruff check --fix .

clean:
	rm -rf .venv output .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
