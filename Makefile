# Everything below makes its own environment: .venv, filled from the package index at first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := output/demo
PORT ?= 7860

.PHONY: help demo app test lint docs doctor gpu-check install clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

app: $(READY) $(DEMO)/model_final.pth  ## serve a web page with the detector that make demo trains, at http://127.0.0.1:7860 (PORT=7860)
	@$(BIN)/python tools/app.py --config-file $(DEMO) --port $(PORT)

$(DEMO)/model_final.pth:
	@test ! -e $(DEMO) || { echo "error: $(DEMO) has no model_final.pth: wait for make demo, or run it again if it was interrupted"; exit 2; }
	@$(MAKE) --no-print-directory demo

test: $(READY)  ## run all tests
	@echo "== Running the tests"
	@$(BIN)/ruff check configs halodet tools tests setup.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup --no-loadscope-reorder

lint: $(READY)  ## check the style and the types
	@$(BIN)/ruff check configs halodet tools tests setup.py
	@$(BIN)/mypy

docs: $(READY)  ## build the documentation into site/
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || \
		$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

doctor: $(READY)  ## print versions, devices and missing dependencies with their fix
	@$(BIN)/python -m halodet.utils.collect_env

gpu-check: $(READY)  ## check the kernels, benchmark and train briefly on an NVIDIA GPU (8 minutes)
	@$(BIN)/python tools/gpu_check.py

install: $(READY)  ## only make the environment

# Filled again when what it is made from changes.
$(READY): setup.py pyproject.toml tools/install_detectron2.py
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON): Python 3.10 or newer is needed, give it with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed, %s is %s: give one with make PYTHON=..." % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 10) else 0)'
	@echo "== Setting up $(VENV) (once; PyTorch is some gigabytes, so this takes a few minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "error: $(PYTHON) could not make an environment: install its venv module (python3-venv on Debian), or give another with make PYTHON=..."; exit 1; }
	@echo "== Installing PyTorch, halodet and what the tests need from the package index"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { echo "== OpenCV's windows need system libraries that are not here: taking the build without windows"; \
		$(BIN)/python -m pip uninstall --quiet --yes opencv-python; $(BIN)/python -m pip install --quiet --disable-pip-version-check opencv-python-headless; }
	@echo "== Installing Detectron2"
	@$(BIN)/python tools/install_detectron2.py
	@touch $(READY)

clean:  ## remove the environment and what demo and tests wrote
	rm -rf $(VENV) output site datasets/shapes .pytest_cache .ruff_cache .mypy_cache
