"""Standard streams that are there, whatever this process was started with."""

import os


def open_standard_streams() -> None:
    """Opens what is closed of descriptors 0 to 2 on /dev/null.

    A pipe or socket that is opened later would get the free number, and be the standard input or output of every
    program that this process starts.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)
