"""The kinds of instruction, each with the precondition of its first operand."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.strategies import instructions_layers as layers
from tests.strategies import instructions_state as state
from tests.strategies import instructions_tensors as tensors
from tests.strategies.builder import Builder, Predicate
from tests.strategies.preconditions import (
    has_head,
    has_weight,
    is_contiguous,
    is_float,
    is_growable,
    is_image,
    is_indices,
    is_joinable,
    is_matrix,
    is_poolable,
    is_square,
    is_tokens,
    is_widest,
    is_writable,
)


@dataclass(frozen=True)
class Instruction:
    """One kind of instruction: what its first operand must be, and how it is written."""

    build: Callable[[Builder, str], None]
    where: Predicate

    @property
    def name(self) -> str:
        """The builder's name."""
        return self.build.__name__


# Simple kinds first: failures shrink towards them.
INSTRUCTIONS: tuple[Instruction, ...] = (
    Instruction(layers.activation, is_float),
    Instruction(layers.linear, is_matrix),
    Instruction(layers.add, is_float),
    Instruction(layers.mul, is_float),
    Instruction(layers.residual, is_matrix),
    Instruction(layers.layer_norm, is_widest),
    Instruction(layers.conv, is_image),
    Instruction(layers.group_norm, is_poolable),
    Instruction(layers.attention, is_tokens),
    Instruction(layers.embedding, is_indices),
    Instruction(layers.tied_head, has_head),
    Instruction(layers.positions, is_matrix),
    Instruction(layers.shared_linear, is_matrix),
    Instruction(layers.weight_view, has_weight),
    Instruction(layers.scalar_option, is_matrix),
    Instruction(layers.conv_transpose, is_growable),
    Instruction(layers.upsample, is_growable),
    Instruction(layers.pool, is_poolable),
    Instruction(tensors.cat, is_joinable),
    Instruction(tensors.split, is_widest),
    Instruction(tensors.cut, is_matrix),
    Instruction(tensors.transpose, is_matrix),
    Instruction(tensors.rare_view, is_widest),
    Instruction(tensors.index, is_matrix),
    Instruction(tensors.contiguous, is_matrix),
    Instruction(tensors.flat_view, is_contiguous),
    Instruction(tensors.reshape, is_matrix),
    Instruction(tensors.to_image, is_square),
    Instruction(tensors.to_tokens, is_image),
    Instruction(tensors.expand, is_matrix),
    Instruction(tensors.reduce, is_matrix),
    Instruction(tensors.broadcast, is_matrix),
    Instruction(tensors.cast, is_float),
    Instruction(tensors.cast_round_trip, is_float),
    Instruction(tensors.dropout, is_float),
    Instruction(tensors.factory, is_matrix),
    Instruction(state.constant, is_matrix),
    Instruction(state.parameter, is_matrix),
    Instruction(state.buffer, is_matrix),
    Instruction(state.counter, is_float),
    Instruction(state.running_mean, is_matrix),
    Instruction(state.cache, is_matrix),
    Instruction(state.buffer_alias, is_matrix),
    Instruction(state.buffer_reassign, is_matrix),
    Instruction(state.write, is_writable),
    Instruction(state.write_through_view, is_writable),
    Instruction(state.fill_slots, is_joinable),
)
