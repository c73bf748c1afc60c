"""Placing replicates and the examples of a batch on devices."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from bnjax.losses import AnyArray
from bnjax.names import choose

AXES = ("replicate", "data")

T = TypeVar("T")


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `replicate=2,data=1` into axis sizes; an axis that is not named has size 1.

    Raises:
        ValueError: if the text is malformed, names an unknown axis or a size below 1.

    Example:
        >>> parse_mesh("replicate=2")
        {'replicate': 2, 'data': 1}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise ValueError(
                f"mesh {text!r}: expected each axis once as AXIS=SIZE with sizes from 1, as in "
                "replicate=2,data=1"
            )
        sizes[choose("mesh axis", axis, AXES)] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(
    replicate: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Devices as a mesh: groups over which replicates are spread, each of `data` devices over which
    the examples of each batch are.

    Takes the first of `devices`, by default of all.

    Raises:
        ValueError: if there are fewer devices than that.
    """
    devices = jax.devices() if devices is None else devices
    count = replicate * data
    if count > len(devices):
        raise ValueError(
            f"mesh replicate={replicate},data={data} needs {count} devices, found {len(devices)} "
            f"of kind {devices[0].device_kind}"
        )
    return Mesh(np.array(devices[:count]).reshape(replicate, data), AXES)


def place(values: AnyArray, sharding: Sharding) -> Array:
    """Puts an array that every process holds whole onto the devices of all of them."""
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def replicate_data(batch: T, mesh: Mesh) -> T:
    """A copy of all arrays on every device of the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda values: place(values, everywhere), batch)


def share(batch: T, mesh: Mesh) -> T:
    """Says, inside a compiled function, that the examples of a batch are spread over `data`.

    Every sum over them, those of batch normalization among them, is one over all devices of the
    axis: the compiler adds what has to be communicated. The axis need not divide the batch.
    """
    if mesh.shape["data"] == 1:
        return batch
    return lax.with_sharding_constraint(batch, PartitionSpec("data"))


def map_replicates(
    function: Callable[..., T], mesh: Mesh, per_replicate: tuple, shared: tuple = ()
) -> T:
    """Calls `function(*per_replicate[r], *shared)` for each replicate r and stacks the results.

    The replicates are dealt to the devices of the mesh. A CPU runs its own one after the other,
    which costs nothing against `vmap`, and makes the numbers of a replicate bitwise the same for
    every number of replicates and devices. An accelerator is filled by running them at once; then
    they agree but for rounding.

    Args:
        function: pure; sees one replicate, without its axis.
        mesh: with an axis `replicate`.
        per_replicate: pytrees whose leaves have a leading axis of length R.
        shared: pytrees that every replicate sees whole.
    """
    count = len(jax.tree.leaves(per_replicate)[0])
    spare = -count % mesh.shape["replicate"]

    def on_device(mine: tuple, shared: tuple) -> T:
        if runs_at_once(mesh):
            return jax.vmap(lambda replicate: function(*replicate, *shared))(mine)

        def one(replicate: tuple) -> T:
            # XLA would unroll a loop of one, move out of a longer one what is shared, and round
            # differently in the two.
            own, common = lax.optimization_barrier((replicate, shared))
            return function(*own, *common)

        return lax.map(one, mine)

    spread = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec("replicate"), PartitionSpec()),
        out_specs=PartitionSpec("replicate"),
        axis_names={"replicate"},
        check_vma=False,
    )
    if not spare:
        return spread(per_replicate, shared)
    padded = jax.tree.map(lambda a: jnp.concatenate([a, *[a[-1:]] * spare]), per_replicate)
    return jax.tree.map(lambda a: a[:count], spread(padded, shared))


def runs_at_once(mesh: Mesh) -> bool:
    """Whether each device of the mesh computes its replicates together."""
    return mesh.devices.flat[0].platform != "cpu"
