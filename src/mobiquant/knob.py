"""The knob that all layers of a model share: thresholds and depth caps as device tensors, and counters of what was read.

`Precision` is one object for a whole model, changed in place: a change needs no recompilation, repacking or reloading.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Precision:
    """Threshold `tau` (fp32) and depth `cap` (int64): one entry for all tokens, or one for each sequence of a batch.

    Counters hold, for each entry and depth, how many weights were read at it: tokens times layer size.
    """

    def __init__(self, widths: tuple[int, ...]):
        self.widths = widths
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}
        # [entries, E] on each device for routed calls; for fixed ones, and for entries that are no more, [E] on the host
        self._read: dict[torch.device, Tensor] = {}
        self._read_fixed = [0.0] * len(widths)
        self._tau = torch.empty(0)
        # what was decided ahead, by the place of its owner, and at which precision
        self._ahead: dict[int, tuple[int, Tensor]] = {}
        self.changes = 0
        self.set([float("-inf")], [len(widths)])

    def set(self, tau: Sequence[float], cap: Sequence[int]) -> None:
        """Change thresholds and caps, in place on every device already in use where their number stays the same."""
        self.changes += 1
        if len(tau) != self._tau.numel():
            self._sum_entries()
            self._read.clear()
        # the device is named because transformers builds models where tensors have no data by default
        self._tau = torch.tensor(tau, dtype=torch.float32, device="cpu")
        self._cap = torch.tensor(cap, dtype=torch.int64, device="cpu")
        # known on the host: whether routers have work, and the depth where every token reads the same
        self.routed = any(t != float("-inf") for t in tau)
        self.fixed = None if self.routed or len(set(cap)) > 1 else int(cap[0])
        for device, (old_tau, old_cap) in list(self._copies.items()):
            if old_tau.shape == self._tau.shape:
                old_tau.copy_(self._tau)
                old_cap.copy_(self._cap)
            else:
                del self._copies[device]

    def get(self) -> tuple[list[float], list[int]]:
        """Thresholds and caps as plain numbers, for `set`."""
        return self._tau.tolist(), self._cap.tolist()

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Thresholds and caps on a device; the same tensors at every call while their number stays the same."""
        if device not in self._copies:
            # made as ordinary tensors, so that they can be changed in place after a first use under inference_mode
            with torch.inference_mode(False):
                self._copies[device] = self._tau.to(device, copy=True), self._cap.to(device, copy=True)
        return self._copies[device]

    def tell(self, place: int, depth: Int[Tensor, " T"]) -> None:
        """Keep the depths of the tokens that run, which were decided for the layers of the owner at a place."""
        self._ahead[place] = self.changes, depth

    def is_told(self, place: int, tokens: int) -> bool:
        """Whether there are depths of so many tokens for a place, decided at this precision."""
        changes, depth = self._ahead.get(place, (-1, None))
        return depth is not None and (changes, depth.shape[0]) == (self.changes, tokens)

    def told(self, place: int, tokens: int) -> Int[Tensor, " T"]:
        """What was decided for a place; raises RuntimeError where nobody has, for so many tokens at this precision."""
        if not self.is_told(place, tokens):
            raise RuntimeError(
                f"{tokens} tokens come to a layer, and no layer before it has decided what they read: run the blocks of the "
                "model in order, or quantise with routers per-input"
            )
        return self._ahead[place][1]

    def record(self, depth: Int[Tensor, " T"] | int, tokens: int, size: int) -> None:
        """Count what `tokens` tokens read in a layer of `size` weights; no host synchronisation."""
        if isinstance(depth, int):
            self._read_fixed[depth - 1] += tokens * size
            return
        every = torch.arange(1, len(self.widths) + 1, device=depth.device)
        opened = depth.view(self._tau.numel(), -1, 1) == every  # [entries, tokens of each, E]
        self.counter(depth.device).add_(opened.sum(1).double() * size)

    def counter(self, device: torch.device) -> Float[Tensor, "entries E"]:
        """The counters of a device, fp64; the same tensor at every call while the number of entries stays the same."""
        if device not in self._read:
            with torch.inference_mode(False):
                shape = self._tau.numel(), len(self.widths)
                self._read[device] = torch.zeros(shape, dtype=torch.float64, device=device)
        return self._read[device]

    def _sum_entries(self) -> None:
        """Move the counters of all entries into one sum, in place: a captured graph may hold their addresses."""
        for counts in self._read.values():
            self._read_fixed = [fixed + count for fixed, count in zip(self._read_fixed, counts.sum(0).tolist(), strict=True)]
            counts.zero_()

    def depth_shares(self, reset: bool = False) -> list[float]:
        """Share of weights read at each depth since the last reset; all zero before any token."""
        self._sum_entries()
        counts = self._read_fixed
        if reset:
            self._read_fixed = [0.0] * len(self.widths)
        total = sum(counts) or 1.0
        return [count / total for count in counts]

    def entry_counts(self) -> Float[Tensor, "entries E"]:
        """Weights that routed calls read at each depth for each entry, since their number changed or the last reset."""
        counts = torch.zeros(self._tau.numel(), len(self.widths), dtype=torch.float64, device="cpu")
        for on_device in self._read.values():
            counts += on_device.cpu()
        return counts
