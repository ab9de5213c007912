"""All ways to break an emitted program outside of its loops, which have their own."""

from __future__ import annotations

from tests.passes import layout_mutations, stream_mutations, value_mutations
from tests.passes.mutations import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    *stream_mutations.mutation.found,
    *layout_mutations.mutation.found,
    *value_mutations.mutation.found,
)
