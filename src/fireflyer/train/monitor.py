"""When to stop a run that has gone wrong, and what to leave for the one who looks: step, layer, batch.

The rule. A loss or gradient norm that isn't finite stops the run before the step is taken. So does a loss that for
PATIENCE steps in a row lies above FACTOR times its running median (over the last WINDOW steps that did not) and more
than one nat above the loss of a uniform guess: a model worse than no model. Spikes that recover, and stretches of data
that merely are harder, do neither.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fireflyer.parallel.ranks import Ranks

WINDOW = 100
FACTOR = 1.5
PATIENCE = 10
FAILURES = "failure"


class LossMonitor:
    """Sees every step's loss in order; `history` are those before, so that a resumed run judges as an unbroken one."""

    def __init__(self, vocab_size: int, history: Iterable[float] = ()) -> None:
        self._guess = math.log(vocab_size)
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        for loss in history:
            self.see(loss)

    def see(self, loss: float) -> str | None:
        """What is wrong, in words, once enough steps in a row are; None otherwise."""
        limit = max(FACTOR * median(self._usual), self._guess + 1) if self._usual else math.inf
        if loss <= limit:
            self._usual.append(loss)
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row < PATIENCE:
            return None
        return f"loss {loss:.4g} after {PATIENCE} steps above {limit:.4g}, its running median {median(self._usual):.4g}"


def non_finite_weights(model: nn.Module, ranks: Ranks) -> str | None:
    """The first parameter with a value that isn't finite, of those that lie on this rank."""
    for name, parameter in model.named_parameters():
        if not bool(ranks.local(parameter.detach()).isfinite().all()):
            return f"the weights of {name}"
    return None


def first_non_finite(model: nn.Module, rerun: Callable[[], None], ranks: Ranks) -> str:
    """Where the first value that isn't finite comes up in a model whose weights are.

    `rerun` does the forward and backward of the batch in question again, on the weights before the step.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor)]
            if not found and not all(bool(x.isfinite().all()) for x in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        rerun()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"the output of {found[0]}"
    # Gradients flow from the last layer to the first: the last parameter that is hit is nearest to the cause.
    gradients = [(name, ranks.local(p.grad)) for name, p in model.named_parameters() if p.grad is not None]
    hit = [name for name, gradient in gradients if not bool(gradient.isfinite().all())]
    return f"the gradient of {hit[-1]}" if hit else "the loss, after the last layer"


def largest_gradient(model: nn.Module, ranks: Ranks) -> str:
    """The parameter whose gradient has the largest norm: where an explosion shows first."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: float(ranks.local(gradient).norm()) for name, gradient in gradients.items()}
    return f"the gradient of {max(norms, key=norms.__getitem__)}" if norms else "no gradient"


def save_failure(run_dir: Path, step: int, tensors: dict[str, Tensor], reason: str, layer: str) -> str:
    """Keep the batch of a failed step, the reason in the file's metadata. Returns where, or why it can't be kept."""
    folder = run_dir / FAILURES
    path = folder / f"step-{step:08d}.safetensors"
    metadata = {"step": str(step), "reason": reason, "layer": layer}
    try:
        folder.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except (OSError, SafetensorError) as error:
        return f"nothing, since the disk refused it ({error})"
    return str(path)


def is_finite(*values: float) -> bool:
    """Whether all are numbers within range."""
    return all(math.isfinite(value) for value in values)
