#!/usr/bin/env python3
"""Serve a trained detector as a web page and over HTTP.

    python tools/app.py --config-file configs/mask_rcnn_halo_h4.yaml \\
        --opts MODEL.WEIGHTS output/mask_rcnn_halo_h4/model_final.pth
    python tools/app.py --model model.onnx
    python tools/app.py --model model.onnx --api-only

The page needs pip install 'halodet[app]'; --api-only needs 'halodet[api]'. An exported model (--model) needs
'halodet[runtime]' too, but no PyTorch and no Detectron2.

Exit code: 0 after Ctrl-C or SIGTERM, 2 for invalid arguments, config or weights, and for a port that is in use.
"""

import os
import sys

if any(word.partition("=")[0] == "--model" for word in sys.argv[1:]):
    os.environ.setdefault("HALODET_REGISTER", "0")  # an exported model needs neither PyTorch nor Detectron2

from halodet.serving.main import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
