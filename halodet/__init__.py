"""halodet: HaloNet backbones for Detectron2. Importing it registers the backbones, the built-in dataset and ``timm://`` with Detectron2."""

import warnings

__version__ = "0.1.0"
__all__ = ["HaloNet", "add_halodet_config", "data"]

try:
    with warnings.catch_warnings():
        # Detectron2 uses torch.jit.script at import; PyTorch's remark on that is nothing a user could act on.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        from halodet import data, weights  # noqa: F401
        from halodet.backbones import HaloNet
        from halodet.config.defaults import add_halodet_config
except Exception as error:  # a PyTorch and a torchvision of different builds raise RuntimeError
    # `python -m halodet.utils.collect_env` must run, and say what is missing, where PyTorch or Detectron2 is not there or does not import.
    _problem = f"halodet is not usable ({type(error).__name__}: {error}): run 'python -m halodet.utils.collect_env' for the mend"
    warnings.warn(_problem, stacklevel=2)

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(_problem)
        raise AttributeError(f"module 'halodet' has no attribute {name!r}")
