# Everything below makes its own environment: .venv, filled from the package index at first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := output/demo

.PHONY: help demo test lint doctor install clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## train a small halo Mask R-CNN on drawn shapes (CPU, minutes), print its AP, draw its detections
	@echo "== Training a small halo Mask R-CNN on the built-in shapes; the log is also in $(DEMO)/log.txt"
	@rm -rf $(DEMO)
	@$(BIN)/python tools/train_net.py --config-file configs/quick/mask_rcnn_halo_shapes.yaml OUTPUT_DIR $(DEMO)
	@echo "== Drawing what it finds in validation images"
	@$(BIN)/python tools/demo.py --config-file configs/quick/mask_rcnn_halo_shapes.yaml --input 'datasets/shapes/val/0000[0-2]?.png' \
		--output $(DEMO)/drawings --opts MODEL.WEIGHTS $(DEMO)/model_final.pth
	@echo "== COCO AP on the validation images"
	@grep -h -A3 -E 'Evaluation results for (bbox|segm)' $(DEMO)/log.txt | grep -v '^--'
	@echo "== Drawings: $(DEMO)/drawings"

test: $(READY)  ## run all tests
	@echo "== Running the tests"
	@$(BIN)/ruff check halodet tools tests setup.py
	@$(BIN)/python -m pytest -q

lint: $(READY)  ## check the style
	@$(BIN)/ruff check halodet tools tests setup.py

doctor: $(READY)  ## print versions, device, what is missing and the mend for it
	@$(BIN)/python -m halodet.doctor

install: $(READY)  ## only make the environment

# Made anew when what it is made from changes; a user who is done with it removes .venv.
$(READY): setup.py tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed, %s is %s: give one with make PYTHON=..." % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 10) else 0)'
	@echo "== Setting up $(VENV) (once; PyTorch is some gigabytes, so this takes a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== Installing PyTorch, halodet and what the tests need from the package index"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	@echo "== Installing Detectron2"
	@$(BIN)/python tools/install_detectron2.py
	@touch $(READY)

clean:  ## remove the environment and what demo and tests wrote
	rm -rf $(VENV) output datasets/shapes .pytest_cache .ruff_cache
