"""What differs in torch.distributed on virtual GPUs: what lives on the host is exchanged on the host.

NCCL's collectives move nothing here (`csrc/nccl.cpp`). Two things that programs do with them are no computation, and
must work: a barrier holds the ranks back, and Python objects (paths, sizes, a plan) pass between them. Both go through
a gloo group of the same ranks, made when it is first needed.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

# Object collectives that every member of the group enters, and those between two ranks, by the name of the other one.
_OF_ALL = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")
_OF_TWO = {"send_object_list": "dst", "recv_object_list": "src"}

# Gloo groups by the ranks that they have.
_host_groups: dict[tuple[int, ...], Any] = {}


def _host_group(c10d: Any, ranks: tuple[int, ...]) -> Any:
    group = _host_groups.get(ranks)
    if group not in c10d._world.pg_map:  # none yet, or destroyed meanwhile
        group = c10d.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        _host_groups[ranks] = group
    return group


def _exchanged_on_the_card(c10d: Any, group: Any) -> bool:
    """Whether this process is in the group and its objects would travel through the card."""
    if group is c10d.GroupMember.NON_GROUP_MEMBER or not c10d.is_initialized():
        return False
    return bool(c10d._get_object_coll_device(group) == "cuda")


def _on_the_host(c10d: Any, name: str, two: str | None = None) -> Callable[..., Any]:
    original: Callable[..., Any] = getattr(c10d, name)
    signature = inspect.signature(original)

    def exchange(*arguments: Any, **options: Any) -> Any:
        call = signature.bind(*arguments, **options)
        group = call.arguments.get("group")
        if not _exchanged_on_the_card(c10d, group):
            return original(*arguments, **options)
        ranks = tuple(c10d.get_process_group_ranks(group or c10d.group.WORLD))
        if two is not None:
            other, in_group = call.arguments.get(two), call.arguments.pop(f"group_{two}", None)
            other = ranks[in_group] if in_group is not None else other
            if other is None:  # from anyone: there is no pair to make a group of
                return original(*arguments, **options)
            call.arguments[two] = other
            ranks = tuple(sorted((c10d.get_rank(), other)))
        call.arguments["group"] = _host_group(c10d, ranks)
        call.arguments.pop("device", None)
        return original(*call.args, **call.kwargs)

    exchange.__name__, exchange.__doc__ = name, original.__doc__
    return exchange


def _barrier(c10d: Any) -> Callable[..., Any]:
    original: Callable[..., Any] = c10d.barrier
    signature = inspect.signature(original)

    def barrier(*arguments: Any, **options: Any) -> Any:
        call = signature.bind(*arguments, **options)
        call.apply_defaults()
        result = original(*arguments, **options)  # what it takes on the card
        group = call.arguments["group"] or c10d.group.WORLD
        outside = group is c10d.GroupMember.NON_GROUP_MEMBER
        if not outside and not call.arguments["async_op"] and "cuda" in {d.type for d in group._device_types}:
            original(group=_host_group(c10d, tuple(c10d.get_process_group_ranks(group))))
        return result

    barrier.__doc__ = original.__doc__
    return barrier


def hook(c10d: ModuleType) -> None:
    """Replaces the functions of `torch.distributed.distributed_c10d`."""
    for name in _OF_ALL:
        setattr(c10d, name, _on_the_host(c10d, name))
    for name, two in _OF_TWO.items():
        setattr(c10d, name, _on_the_host(c10d, name, two))
    c10d.barrier = _barrier(c10d)  # type: ignore[attr-defined]
