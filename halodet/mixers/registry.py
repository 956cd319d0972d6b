"""The base class of mixers, and the registry that finds them by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

MIXERS: dict[str, "type[Mixer]"] = {}
MixerType = TypeVar("MixerType", bound="type[Mixer]")


@dataclass(frozen=True)
class MixerSpec:
    """Arguments that a bottleneck block passes to its mixer; a mixer uses those it needs.

    Args:
        channels: number of input channels.
        value_channels: number of channels of attention values, which is the number of output channels of an attention
            mixer.
        stride: stride of the output, 1 or 2.
        dilation: dilation of convolutions; attention ignores it.
        index: position of the block in its stage, from 0.
        num_heads: number of attention heads.
        block_size: side of an attention block in pixels.
        halo_size: width of the halo around a block in pixels.
        border: ``"mask"`` or ``"zero"``, see :func:`halodet.attention.halo_attention`.
        backend: attention backend, see :func:`halodet.attention.halo_attention`.
        norm: factory of normalization layers, called with a number of channels.
        activation: factory of activation layers, called without arguments.
        options: options of this mixer by name (the mixer's entry of ``MODEL.HALONET.MIXER_OPTIONS``).
    """

    channels: int
    value_channels: int
    stride: int = 1
    dilation: int = 1
    index: int = 0
    num_heads: int = 8
    block_size: int = 8
    halo_size: int = 3
    border: str = "mask"
    backend: str = "auto"
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    activation: Callable[[], nn.Module] = nn.ReLU
    options: Mapping[str, Any] = field(default_factory=dict)

    def read_options(self, **defaults: Any) -> dict[str, Any]:
        """Return ``options`` on top of ``defaults``.

        Raises:
            ValueError: ``options`` has a name that ``defaults`` does not have.
        """
        for name, value in self.options.items():
            if name not in defaults:
                known = f"one of {', '.join(sorted(defaults))}" if defaults else "no options"
                raise ValueError(f"mixer option {name}={value!r} is invalid: expected {known}")
        return {**defaults, **self.options}


class Mixer(nn.Module):
    """Base class of mixers.

    A mixer maps (B, channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)) for any H and W.

    A subclass sets ``out_channels``, implements :meth:`from_spec` and ``forward``, and overrides what other parts of
    halodet ask of it.

    Attributes:
        out_channels: number of output channels.
        is_attention: whether the mixer is attention. If not, and ``conv.weight`` is a 3x3 kernel, the weights of a
            ResNet are loaded into it.
        rel_pos_tables: names of the relative position tables among the mixer's parameters. They get
            ``SOLVER.WEIGHT_DECAY_REL_POS`` and are resized when a checkpoint is loaded.
    """

    out_channels: int
    is_attention: ClassVar[bool] = False
    rel_pos_tables: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "Mixer":
        """Build the mixer; read its own options with :meth:`MixerSpec.read_options`."""
        raise NotImplementedError(f"{cls.__name__} does not implement from_spec")

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters, relative to the mixer, that get no weight decay."""
        return set(self.rel_pos_tables)

    def rel_pos_layout(self) -> dict[str, int]:
        """Return the sizes that determine the rows of the tables; they are saved with a checkpoint."""
        return {}

    def infer_rel_pos_layout(self, rows: int, metadata: Mapping[str, Any]) -> dict[str, int]:
        """Return the layout of a table with ``rows`` rows in a checkpoint with ``metadata``.

        The default takes the metadata, and this mixer's own layout where the metadata has none.
        """
        own = self.rel_pos_layout()
        try:
            return {name: int(metadata[name]) for name in own}
        except (KeyError, TypeError, ValueError):
            return own

    def resize_rel_pos(self, table: Tensor, layout: Mapping[str, int]) -> Tensor:
        """Resize a checkpoint's ``table`` from ``layout`` to this mixer; the default returns it unchanged."""
        return table


def register_mixer(name: str) -> Callable[[MixerType], MixerType]:
    """Return a class decorator that registers a :class:`Mixer` as ``name``, the name used in ``MODEL.HALONET.MIXERS``.

    Raises:
        TypeError: the class is not a subclass of :class:`Mixer`.
    """

    def register(mixer: MixerType) -> MixerType:
        if not (isinstance(mixer, type) and issubclass(mixer, Mixer)):
            raise TypeError(f"register_mixer({name!r}) got {mixer!r}, expected a subclass of halodet.mixers.Mixer")
        MIXERS[name] = mixer
        return mixer

    return register


def build_mixer(name: str, spec: MixerSpec) -> Mixer:
    """Build the mixer registered as ``name``.

    Raises:
        ValueError: there is no mixer of that name, or ``spec`` is invalid for it.
    """
    if name not in MIXERS:
        raise ValueError(f"mixer {name!r} is invalid: expected one of {', '.join(sorted(MIXERS))}")
    return MIXERS[name].from_spec(spec)
