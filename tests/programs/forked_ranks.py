"""What `torchrun --nproc-per-node PROCESSES -m MODULE ARGUMENTS` starts, forked from a process that has imported all.

Called as `forked_ranks PROCESSES MODULE ARGUMENTS`.
"""

import os
import runpy
import socket
import sys

processes, module = int(sys.argv[1]), sys.argv[2]
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
sys.argv[:3] = [module]
children = []
for rank in range(processes):
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit("the command ended without an exit code")
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(max(codes, key=abs))
