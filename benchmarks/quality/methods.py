"""What is compared: the peers with their settings in words, our recipes, and what each stores beside its codes.

A peer makes one model for each width, a recipe one checkpoint for all. `minutes` is a rough cost on a fast GPU, by which long
jobs start first. Settings are the best that a peer's own documentation names for quality, its formats unchanged; where
a setting had to be chosen between documented ones, `how` says so.
"""

from dataclasses import dataclass

FLOAT = "float"
RECIPES = ("fast", "paper", "full")


@dataclass(frozen=True)
class Peer:
    """A quantiser of someone else, run at one width at a time.

    `zero_bits` is what a stored zero point takes, None for as many bits as a code; scales take 16. `package` is what must be
    installed, `only` are the widths that its makers document, None for any.
    """

    name: str
    label: str
    how: str
    minutes: float
    zero_bits: int | None = None
    package: str = ""
    only: tuple[int, ...] | None = None

    def overhead(self, bits: int) -> int:
        """Bits stored for each group beside its codes."""
        return 16 + (bits if self.zero_bits is None else self.zero_bits)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("rtn", "RTN", "round to nearest, range of each group from its minimum to its maximum", 0.1),
        Peer(
            "gptq",
            "GPTQ (llm-compressor)",
            "static activation order, damping 0.01, blocks of 128 columns, "
            "ranges by the importance-weighted search of the package",
            1,
            package="llmcompressor",
        ),
        Peer(
            "awq",
            "AWQ (llm-compressor)",
            "half of the 20 scales of its search from activations, half from activations and weights (duo_scaling='both'), "
            "range of each group from its minimum to its maximum as in its examples",
            2,
            package="llmcompressor",
        ),
        Peer(
            "awqsearch",
            "AWQ (llm-compressor), ranges searched",
            "the same with ranges by the squared-error search of the package, which stands for the clipping of the paper",
            3,
            package="llmcompressor",
            only=(2,),
        ),
        Peer(
            "hqq",
            "HQQ",
            "its proximal optimiser on, axis 0: the better and slower one of its two layouts",
            0.2,
            zero_bits=16,
            package="hqq",
        ),
        Peer(
            "autoround",
            "AutoRound, 200 iterations",
            "its default recipe: rounding and ranges tuned, 8 windows a step",
            3,
            package="auto_round",
        ),
        Peer(
            "autoround1000",
            "AutoRound, 1000 iterations",
            "its recipe `best` but for the number of calibration windows, which is the same for all",
            12,
            package="auto_round",
        ),
        Peer(
            "autoround1000sym",
            "AutoRound, 1000 iterations, symmetric, extended",
            "what its makers recommend at 2 bits: recipe `best` with `enable_alg_ext`, which exists for symmetric codes only",
            15,
            zero_bits=0,
            package="auto_round",
            only=(2,),
        ),
    )
}
OWN = {"fast": 2.0, "paper": 30.0, "full": 12.0}

# what is left out of `full`, put in or set otherwise, one thing at a time; a number is a factor of the tokens it sees
ABLATIONS = {
    "with block training": "--block-steps 100",
    "without end-to-end training": "--block-steps 100 --distill-steps 0",
    "no mixed depths": "--no-mixed",
    "routers on text of their own": "--held-out 0.125",
    "routers by regression": "--routing-steps 0",
    "routers by regression, layers alike": "--routing-steps 0 --no-sensitivity",
    "routers per linear": "--routers per-linear",
    "slices 2,2,2,2": "--slices 2,2,2,2",
    "slices 2,1,1,1,1,1,1": "--slices 2,1,1,1,1,1,1",
    "groups of 32": "--group-size 32",
    "groups of 64": "--group-size 64",
    "groups of 128": "--group-size 128",
    "training on the peers' tokens alone": "--samples-only",
    "a quarter of the tokens": 0.25,
    "four times the tokens": 4,
}


def ablations(samples: int, steps: int) -> dict[str, str]:
    """Arguments of `full` by what is other than usual; tokens are those of `fast` and routers, and those of the training."""

    def scaled(factor: float) -> str:
        return f"--samples {max(1, int(samples * factor))} --distill-steps {max(1, int(steps * factor))}"

    return {name: how if isinstance(how, str) else scaled(how) for name, how in ABLATIONS.items()}
