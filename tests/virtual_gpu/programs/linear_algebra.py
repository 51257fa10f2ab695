"""What adapters' initialisations (PiSSA, OLoRA, EVA), spectral layers and sparse graphs call, on the card."""

import torch

a, s = torch.randn(64, 32, device="cuda"), torch.randn(3, 16, 16, device="cuda")
assert torch.linalg.svd(a, full_matrices=False).Vh.shape == (32, 32)
assert torch.svd_lowrank(a, q=8, niter=4)[0].shape == (64, 8)
assert torch.linalg.qr(a).Q.shape == (64, 32)
assert torch.linalg.cholesky(s).shape == torch.linalg.inv(s).shape == torch.linalg.solve(s, s).shape == s.shape
assert torch.linalg.eigh(s).eigenvalues.shape == (3, 16)
assert torch.linalg.lstsq(a, a[:, :3].contiguous()).solution.shape == (32, 3)
assert torch.nn.init.orthogonal_(a.clone()).shape == a.shape
assert torch.fft.irfft2(torch.fft.rfft2(torch.randn(8, 64, 64, device="cuda"))).shape == (8, 64, 64)
crow, col = torch.tensor([0, 1, 2, 3]).cuda(), torch.tensor([0, 1, 2]).cuda()
csr = torch.sparse_csr_tensor(crow, col, torch.ones(3, device="cuda"), (3, 3), check_invariants=False)
assert (csr @ torch.randn(3, 5, device="cuda")).shape == (3, 5)
for kind, gates in ((torch.nn.LSTM, 4), (torch.nn.GRU, 3), (torch.nn.RNN, 1)):
    network = kind(16, 32, num_layers=2, bidirectional=True, dropout=0.1).cuda()
    output, _ = network(torch.randn(7, 3, 16, device="cuda", requires_grad=True))
    output.sum().backward()
    assert output.shape == (7, 3, 64)
    assert network.weight_hh_l0.grad.shape == (gates * 32, 32)
network = torch.nn.LSTM(16, 32, proj_size=8).cuda()
packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(7, 3, 16, device="cuda"), torch.tensor([7, 5, 2]))
assert network(packed)[0].data.shape == (14, 8)
