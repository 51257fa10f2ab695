"""What is known of the card that a table is about."""

from qlora_lowmem import virtual_gpu


def usable_bytes(card: str) -> int | None:
    """What a job, its CUDA context included, can count on on that card; None for one that the table does not have."""
    try:
        return virtual_gpu.get_card(card).usable_bytes
    except virtual_gpu.UnknownCardError:
        return None
