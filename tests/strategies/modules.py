"""Random small `nn.Module`s for property tests: valid by construction, captured by `torch.export`, printable as Python.

A program is a straight list of Python lines, built forward: each line is run on real tensors as it is drawn, so that
the next line is chosen among operators whose preconditions (shape, stride, dtype, aliasing) are met by values that
exist. Nothing is filtered afterwards. The lines are the forward function: what a failure prints is what ran.

    def forward(self, x, ids=None, *, y=None, scale=1.0, flip=False):
        v0 = self.layers.linear0(x)
        v1 = v0[:, 1:3]
        v1.mul_(torch.sigmoid(v1))
        return {"a": v0, "b": (v1, None)}

Inputs, weights and constants are never written; intermediates and buffers are, also through views.

Left out, because `torch.export` (torch 2.13, `strict=False`) itself fails or differs from eager:

- writing a plain tensor attribute (`self.const.add_(1)`): captured without an error, the exported results differ;
- writing through `.data`: refused, "found a fake tensor in the exported program constant's list";
- `int(t)` or `t.item()` where a shape depends on it: refused, a data-dependent guard.
"""

import torch
from hypothesis import strategies as st

from tests.strategies.builder import Builder
from tests.strategies.instructions import INSTRUCTIONS
from tests.strategies.program import Case, GeneratedModule

__all__ = ["INSTRUCTIONS", "Case", "GeneratedModule", "cases"]


@st.composite
def cases(
    draw: st.DrawFn, *, min_instructions: int = 3, max_instructions: int = 25, exclude: frozenset[str] = frozenset()
) -> Case:
    """Draw a `Case`; `exclude` names instruction kinds (see `INSTRUCTIONS`) that must not appear."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        b = Builder(draw)
        for _ in range(draw(st.integers(min_instructions, max_instructions))):
            ready = [i for i in INSTRUCTIONS if i.name not in exclude and b.having(i.where)]
            chosen = draw(st.sampled_from([None, *ready]))  # None: failures shrink to fewer lines
            if chosen:
                chosen.build(b, b.operand(chosen.where))
        _return(b)
        return b.case()


def _return(b: Builder) -> None:
    """The last line: the newest value, with others, in one of several structures."""
    last = next(reversed(b.values))
    others = b.draw(st.lists(st.sampled_from(list(reversed(b.values))), max_size=3))
    view = f"{last}.transpose(0, -1)" if b.values[last].ndim else f"{last}.view(1)"
    forms = [
        last,
        f"({', '.join([last, *others])},)",
        f"[{', '.join([last, *others])}]",
        f"({last}, {last})",
        f"({last}, {view})",
        f"({last}, x)",
        f"({last}, 3, None, 2.5)",
        "{" + ", ".join(f'"{k}": {v}' for k, v in zip("abcd", [last, *others], strict=False)) + "}",
        f'{{"a": ({last}, None), "b": [{", ".join(others)}], "c": None}}',
    ]
    b.module.lines.append(f"return {b.draw(st.sampled_from(forms))}")
