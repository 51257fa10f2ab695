"""What a program is answered on a virtual GPU where a card would have computed.

`VALUES` is what becomes of values: an expression, its result, the reason. A test evaluates every one of them, with

    x = torch.ones(8, device="cuda")
    mask = torch.zeros(8, dtype=torch.bool, device="cuda")
    ids = torch.arange(8, device="cuda")
    labels = torch.full((2, 4), -100, device="cuda")

`FACTS` is the rest: the question, the answer, the reason.
"""

_READ = "a value read from the device is zero"
_SELECT = "a mask without values could select everything"
_SIZE = "the zero is taken as the size: there is no largest one"

VALUES: tuple[tuple[str, str, str], ...] = (
    ("x.sum().item()", "0.0", _READ),
    ("x.tolist()[0]", "0.0", _READ),
    ("float(x.cpu()[3])", "0.0", _READ),
    ("bool(x.any())", "False", _READ),
    ("bool(mask.all())", "False", _READ),
    ("bool(x.isnan().any())", "False", _READ + ": no loss is ever NaN, and GradScaler finds no infinity"),
    ("torch.equal(x, x + 1)", "False", _READ),
    ("int(x.argmax())", "0", _READ),
    ("mask.nonzero().shape", "torch.Size([8, 1])", _SELECT),
    ("torch.argwhere(mask).shape", "torch.Size([8, 1])", _SELECT),
    ("torch.where(mask)[0].shape", "torch.Size([8])", _SELECT),
    ("x[mask].shape", "torch.Size([8])", _SELECT),
    ("x[~mask].shape", "torch.Size([8])", _SELECT + ": a mask and its opposite both do"),
    ("torch.masked_select(x, mask).shape", "torch.Size([8])", _SELECT),
    ("labels[labels != -100].shape", "torch.Size([8])", _SELECT + ": no label is ignored"),
    ("torch.unique(ids).shape", "torch.Size([8])", "every element could be different"),
    ("torch.unique_consecutive(ids).shape", "torch.Size([8])", "every element could be different"),
    ("torch.unique(labels, dim=0).shape", "torch.Size([2, 4])", "every row could be different"),
    ("int((labels != -100).sum())", "0", _READ + ": a count of tokens, which only scales a loss"),
    ("torch.arange(int(ids.max()) + 1).shape", "torch.Size([1])", _SIZE),
    ("torch.bincount(ids).shape", "torch.Size([1])", _SIZE),
    ("torch.bincount(ids, minlength=16).shape", "torch.Size([16])", _SIZE + ", but minlength holds"),
    ("torch.nn.functional.one_hot(ids, 8).shape", "torch.Size([8, 8])", "the size is given"),
    ("torch.nn.functional.one_hot(ids).shape", "torch.Size([8, 1])", _SIZE),
    ("x.repeat_interleave(ids).shape", "torch.Size([8])", "each once: there is no largest size; pass output_size="),
    ("x.repeat_interleave(ids, output_size=28).shape", "torch.Size([28])", "the size is given"),
    ("x[: int(ids[-1])].shape", "torch.Size([0])", _SIZE + ": keep sequence lengths (packing) on the host"),
    ("torch.sparse_coo_tensor(ids[None], x, (8,)).coalesce()._nnz()", "0", _SIZE),
    ("torch.where(mask, x, 0 * x).shape", "torch.Size([8])", "no size depends on the values"),
    ("x.masked_fill(mask, 0).shape", "torch.Size([8])", "no size depends on the values"),
    ("torch.nonzero_static(mask, size=3).shape", "torch.Size([3, 1])", "the size is given"),
    ("torch.topk(x, 3).values.shape", "torch.Size([3])", "the size is given"),
    ("torch.multinomial(x, 2).shape", "torch.Size([2])", "the size is given"),
)

FACTS: tuple[tuple[str, str, str], ...] = (
    (
        "Tensor.all(), torch.all() of a CUDA tensor, asked by transformers",
        "True",
        "it asks whether a batch has no padding; the zero would make it build an (S, S) mask that a full batch has not",
    ),
    ("a Triton launch, compiled by Inductor or the user's own, autotuned or not", "nothing", "it allocates nothing"),
    (
        "cuDNN attention (the default from sm_90 on)",
        "planned by cuDNN's frontend in PyTorch; the plan itself needs no workspace",
        "the sums of the softmax and the fp32 accumulator of the queries' gradient are the frontend's and counted; "
        "what the engine would take beside them is not known here",
    ),
    (
        "a cuDNN plan (convolutions)",
        "needs no workspace",
        "which engine cuDNN would choose on the card is not known here: a real one may need more",
    ),
    (
        "cuDNN's older interface: batch norm, CTC, dropout states",
        "computes nothing, workspace 0, told once",
        "their workspaces are small, and not known here",
    ),
    (
        "cuDNN's RNNs",
        "weights laid out as cuDNN does; workspace and reserve are estimates, told once",
        "cuDNN does not document them; the estimate is what the backward pass cannot do without",
    ),
    (
        "cuSOLVER, cuSPARSE, cuFFT",
        "compute nothing, workspace 0, told once a library",
        "PyTorch allocates results and the workspaces it is told of; their sizes on the card are not known here",
    ),
    (
        "NCCL's collectives",
        "move nothing, wait for nobody",
        "PyTorch allocates their tensors; NCCL's own buffers (channels, connections, NVLS) come from the driver, "
        "depend on the machine's links, are not known here, and are in no peak: told once",
    ),
    (
        "a host value that a collective brings back before any kernel ran (DistributedDataParallel's bucket plan)",
        "what this rank sent",
        "every rank runs the same program",
    ),
    (
        "torch.distributed.barrier, and collectives of Python objects",
        "real, through a gloo group of the same ranks",
        "they order processes and carry host values; the small CUDA tensors that carry objects on a card are not made",
    ),
    (
        "CUDA graphs, memory pools of the driver (cudaMallocAsync), sharing device memory between processes (IPC), "
        "symmetric memory, cuSPARSELt, cuDNN's older convolutions",
        "refused, by name",
        "what they would take of the memory is not known here, and a peak without it would be wrong",
    ),
)
