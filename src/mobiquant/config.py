"""Settings as frozen dataclasses, their checks, and the one exception for bad input.

`Format` says how weights are stored, `Calibration` what a recipe may spend. Both travel as plain JSON in `config.json`.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any, Literal

from mobiquant import slices as s

# stands between the names of several calibration texts
BETWEEN = " + "
QUANT_METHOD = "mobiquant"
FORMAT_VERSION = 2
RECIPES = ("fast", "paper", "full")
ROUTERS = ("per-block", "per-input", "per-linear")


class InputError(ValueError):
    """Bad input, told in one sentence that names what is wrong and the way out; the command line exits with 2."""


@dataclass(frozen=True)
class Format:
    """How the weights of a checkpoint are stored. Raises InputError on settings that cannot be.

    `routers` says what they read: `per-block`, the input of a block's first layers, for the rest of the block and the first
    layers of the next; `per-input`, the input of the layers themselves; `per-linear`, the same with a router for each layer.
    `router_outputs` is the number of scores that stored routers give; more than `len(slices) - 1` only where a checkpoint was
    loaded without its last slices.
    """

    slices: tuple[int, ...] = (2, 1, 1, 2, 2)
    group_size: int = 128
    routers: Literal["per-block", "per-input", "per-linear"] = "per-block"
    router_hidden: int = 16
    router_outputs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "slices", tuple(int(width) for width in self.slices))
        try:
            s.check_slices(self.slices)
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.group_size < 8 or self.group_size % 8:
            raise InputError(
                f"a group size of {self.group_size} is not usable: give a positive multiple of 8, such as 64 or 128"
            )
        if self.routers not in ROUTERS:
            raise InputError(f"routers '{self.routers}' are unknown: choose {', '.join(ROUTERS[:-1])} or {ROUTERS[-1]}")
        if self.router_hidden < 1:
            raise InputError(f"a router width of {self.router_hidden} is not usable: give 1 or more hidden units")
        if self.router_outputs is None:
            object.__setattr__(self, "router_outputs", len(self.slices) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits read at each depth, ascending."""
        return s.bounds(self.slices)

    def check_bits(self, bits: float) -> None:
        """Raise InputError unless `bits` is a number within the range of the slices."""
        low, high = self.widths[0], self.widths[-1]
        if not isinstance(bits, Real) or not low <= bits <= high:
            raise InputError(f"{bits} bits cannot be read: this model reads from {low} to {high} bits")

    def depth(self, bits: float) -> int:
        """Slices that make up exactly `bits`; raises InputError where no prefix has that width."""
        self.check_bits(bits)
        try:
            return s.depth_for(self.slices, bits)
        except ValueError as error:
            raise InputError(f"{error}; leave out the fixed mode to read {bits:g} bits on average") from None

    def truncated(self, max_bits: float) -> "Format":
        """The format of a load that keeps only the slices of the first `max_bits` bits."""
        kept = [width for width in self.widths if width <= max_bits]
        if len(kept) < 2:
            raise InputError(f"max_bits={max_bits:g} keeps fewer than two slices: give {self.widths[1]} or more")
        return replace(self, slices=self.slices[: len(kept)])


def default_routers(recipe: str) -> Literal["per-block", "per-input"]:
    """What routers read where nothing is said: the paper recipe trains block by block, and knows no block before."""
    return "per-input" if recipe == "paper" else "per-block"


# of the fast recipe; what more of them are worth is in docs/results/fast.md
SWEEPS = 3


@dataclass(frozen=True)
class Calibration:
    """What a recipe calibrates with; None means a default that `resolved` fills in.

    `depth_weights` are the `lam_e` of the depths. `epochs`, `learning_rate` and `target_bits` matter to the paper recipe,
    `sweeps`, passes of coordinate descent, to the others.
    """

    recipe: str = "fast"
    text: str = "builtin"
    samples: int | None = None
    sequence_length: int | None = None
    seed: int = 0
    batch: int = 8
    depth_weights: tuple[float, ...] | None = None
    sweeps: int | None = None
    epochs: int = 20
    learning_rate: float = 5e-3
    target_bits: float = 3.0

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise InputError(f"recipe '{self.recipe}' is unknown: choose {', '.join(RECIPES[:-1])} or {RECIPES[-1]}")
        for name, least in (("samples", 1), ("sequence_length", 8), ("batch", 1), ("sweeps", 0), ("epochs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', ' ')} of {value} is not usable: give {least} or more")

    def resolved(self, slices: tuple[int, ...], on_cpu: bool) -> "Calibration":
        """With every default filled in: fewer tokens for the fast recipe on a CPU, where a user waits for them.

        Codes that are trained after start from one sweep.
        """
        samples, length = (128, 2048) if self.recipe in ("paper", "full") else (8, 512) if on_cpu else (128, 1024)
        return replace(
            self,
            samples=self.samples or samples,
            sequence_length=self.sequence_length or length,
            depth_weights=self.depth_weights or default_depth_weights(slices),
            sweeps=(SWEEPS if self.recipe == "fast" else 1) if self.sweeps is None else self.sweeps,
        )


def default_depth_weights(slices: tuple[int, ...]) -> tuple[float, ...]:
    """Weights `lam_e` of the depths in every sum over depths: tripled with each bit up to 5 bits, constant beyond."""
    return tuple(float(3 ** (min(max(width, 2), 5) - 2)) for width in s.bounds(slices))


@dataclass(frozen=True)
class Training:
    """How the full recipe trains; a stage with no steps is left out. `block_steps` None leaves that to the end-to-end stage.

    Rates are those of AdamW: of the places of weights and of zero points in base steps, of the logarithm of scales. The
    divergence of each depth enters the loss as `KL^loss_power / loss_power`, its logarithm at 0. An end-to-end step makes
    `passes_per_step` passes, each at another depth, the last at a mixture of two where `mixed`. With `sensitivity` routers
    compare layers by what each is worth to the model; then `routing_steps` train them end to end, `router_rate` being the rate
    of Adam for the biases of scores. The end-to-end stages draw windows from the `whole_text`, or from the calibration windows
    alone, which are what the other recipes see; `held_out` is the share of these that codes leave to the routers.
    `budget_minutes` bounds the whole recipe by taking fewer steps.
    """

    block_steps: int | None = None
    block_batch: int = 8
    distill_steps: int = 1300
    distill_batch: int = 4
    passes_per_step: int = 5
    mixed: bool = True
    position_rate: float = 1.4e-3
    scale_rate: float = 7e-4
    zero_rate: float = 1.4e-3
    loss_power: float = 0.5
    clip_norm: float = 1.0
    sensitivity: bool = True
    routing_steps: int = 300
    router_rate: float = 6e-2
    whole_text: bool = True
    held_out: float = 0.0
    budget_minutes: float | None = None

    def __post_init__(self) -> None:
        least = {"block_steps": 0, "distill_steps": 0, "routing_steps": 0}
        least |= {"block_batch": 1, "distill_batch": 1, "passes_per_step": 1}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise InputError(f"{name.replace('_', ' ')} of {given} is not usable: give {value} or more")
        if not 0 <= self.held_out <= 0.5:
            raise InputError(f"held out of {self.held_out:g} is not usable: give a share of the text from 0 to 0.5")
        if self.budget_minutes is not None and self.budget_minutes <= 0:
            raise InputError(f"a budget of {self.budget_minutes:g} minutes leaves no time: give more than 0")


@dataclass(frozen=True)
class Checkpoint:
    """Everything but tensors: the `quantization_config` of a `config.json`.

    `inputs` lists the quantised linears, those that read the same input together, the owner of a shared router first;
    `blocks` are the places in it where blocks begin. `thresholds` is the table of `budget.py`; `skipped` maps layers left as
    they were to the reason.
    """

    format: Format
    inputs: tuple[tuple[str, ...], ...]
    blocks: tuple[int, ...] = ()
    thresholds: tuple[dict[str, Any], ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def firsts(self) -> tuple[str, ...]:
        """First layers of the blocks, where routers are `per-block`; but for the first block's, their routers lie with those of
        the block before."""
        return tuple(self.inputs[place][0] for place in self.blocks) if self.format.routers == "per-block" else ()

    def read_by_routers(self) -> dict[str, str]:
        """Owner -> the layer whose input its router reads: itself, the first layer of its block, or of the block before."""
        if self.format.routers == "per-linear":
            return {name: name for names in self.inputs for name in names}
        if self.format.routers == "per-input":
            return {names[0]: names[0] for names in self.inputs}
        if self.inputs and (not self.blocks or self.blocks[0] != 0):
            raise InputError("the checkpoint does not say where its blocks begin: quantise the model again")
        read: dict[str, str] = {}
        firsts = self.firsts
        first = firsts[0] if firsts else ""
        for names in self.inputs:
            read[names[0]] = first
            if names[0] in firsts:
                first = names[0]
        return read

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, `quant_method` and `format_version` first."""
        head = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "format"}
        rest |= {"inputs": [list(names) for names in self.inputs], "blocks": list(self.blocks)}
        return {**head, **asdict(self.format), **rest}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Checkpoint":
        """Read back `to_dict`; raises InputError on another method, a newer version or missing entries."""
        if values.get("quant_method") != QUANT_METHOD:
            raise InputError(f"the checkpoint is quantised with '{values.get('quant_method')}', not with {QUANT_METHOD}")
        version = values.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise InputError(
                f"the checkpoint has format version {version}, this mobiquant reads up to {FORMAT_VERSION}: upgrade mobiquant"
            )
        try:
            form = Format(**({f.name: values[f.name] for f in fields(Format)} | {"slices": tuple(values["slices"])}))
            rest = {f.name: values[f.name] for f in fields(cls) if f.name not in ("format", "inputs", "blocks", "thresholds")}
            inputs = tuple(tuple(names) for names in values["inputs"])
            # before version 2 no router read another layer's input
            return cls(form, inputs, tuple(values.get("blocks", ())), tuple(values["thresholds"]), **rest)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"the quantization_config of the checkpoint is damaged ({error}): quantise the model again"
            ) from None
