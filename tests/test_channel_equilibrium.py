"""Channel Equilibrium against the official block, its limits, the forms that inputs take, and pruning behind norms."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proof import outputs, randomise, relative_error
from torch import Tensor, nn
from torch.autograd import gradcheck
from versions import needs

from lightning_prune.layers import BatchDecorrelation, ChannelEquilibrium, Equilibrated, InstanceReweighting
from lightning_prune.layers.norms import channel_dim
from lightning_prune.layers.whitening import inverse_root

BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "CE": partial(ChannelEquilibrium, 8, group_size=4),
    "BD": partial(BatchDecorrelation, 8, group_size=4),
    "IR": partial(InstanceReweighting, 8),
}
each_block = pytest.mark.parametrize("name", BLOCKS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def block(name: str = "CE", *, training: bool = True, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A block with random parameters; its statistics are those of three batches, and not quite symmetric."""
    torch.manual_seed(5)
    made = BLOCKS[name](**settings).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    for seed in range(3):
        made(images(seed).to(dtype).movedim(1, made.channel_dim))
    return made.train(training)


def images(seed: int = 0, examples: int = 4, channels: int = 8, *sizes: int) -> Tensor:
    """Channels that depend on each other: (n, c, ...), by default of 3 x 5 positions."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(examples, channels, *(sizes or (3, 5)), dtype=torch.float64, generator=generator)
    return x + 0.5 * x.roll(1, 1) + 0.1 * torch.arange(channels).view(-1, *([1] * (x.dim() - 2)))


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    module(x).square().sum().backward()
    used = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return [x.grad, *used]  # type: ignore[list-item]


class Official(nn.Module):
    """What CE_module.py of the authors does, mended: buffers are copies, start from ones, variances are biased."""

    def __init__(self, gate: nn.Module, groups: int, size: int, share: Tensor) -> None:
        super().__init__()
        self.gate, self.groups, self.size = gate, groups, size
        self.wm, self.scale = torch.eye(size).repeat(groups, 1, 1).double(), torch.tensor(1.0).double()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        variances = x.flatten(2).var(-1, unbiased=False)
        if self.training:
            rows = x.transpose(0, 1).reshape(self.groups, self.size, -1)
            centred = rows - rows.mean(-1, keepdim=True)
            sigma = centred @ centred.mT / rows.shape[-1] + 1e-5 * torch.eye(self.size)
            normal = sigma / sigma.diagonal(dim1=1, dim2=2).sum(-1).view(-1, 1, 1)
            wm = torch.eye(self.size).double().repeat(self.groups, 1, 1)
            for _ in range(3):
                wm = 1.5 * wm - 0.5 * torch.matrix_power(wm, 3) @ normal
            scale = (variances.mean() + 1e-5).sqrt()
            self.wm = 0.9 * self.wm + 0.1 * wm.detach()
            self.scale = 0.9 * self.scale + 0.1 * scale.detach()
        else:
            wm, scale = self.wm, self.scale
        white = wm @ x.transpose(0, 1).reshape(self.groups, self.size, -1)
        decorrelated = white.reshape(c, n, h, w).transpose(0, 1)
        reweighted = x * (self.gate(variances) / scale).view(n, c, 1, 1)
        return self.share * decorrelated + (1 - self.share) * reweighted


class TestEquations:
    @pytest.mark.parametrize(("groups", "size"), [(1, 8), (2, 4), (8, 1)])
    @pytest.mark.parametrize("mixing", [0.0, -1.3])
    def test_it_is_the_official_block(self, groups: int, size: int, mixing: float) -> None:
        own = randomise(ChannelEquilibrium(8, group_size=size).double())
        own.decorrelation.running_whitening.copy_(torch.eye(size))
        own.reweighting.running_scale.fill_(1.0)
        own.mixing.data.fill_(mixing)
        official = Official(copy.deepcopy(own.reweighting.gate), groups, size, own.mixing.detach().sigmoid())
        for seed in range(3):
            x = images(seed)
            assert torch.allclose(own(x), official(x), rtol=0, atol=1e-12)
            one, other = (gradients(copy.deepcopy(each), x)[0] for each in (own, official))
            assert torch.allclose(one, other, rtol=0, atol=1e-10)
        assert torch.allclose(own.decorrelation.running_whitening, official.wm, rtol=0, atol=1e-12)
        assert own.reweighting.running_scale.item() == pytest.approx(float(official.scale), abs=1e-12)
        assert torch.allclose(own.eval()(images(7)), official.eval()(images(7)), rtol=0, atol=1e-12)

    @in_both_modes
    @pytest.mark.parametrize(("mixing", "branch"), [(40.0, "decorrelation"), (-40.0, "reweighting")])
    def test_the_mixture_ends_in_its_branches(self, mixing: float, branch: str, training: bool) -> None:
        whole = block(training=training)
        whole.mixing.data.fill_(mixing)
        alone = copy.deepcopy(getattr(whole, branch))
        assert torch.allclose(whole(images(9)), alone(images(9)), rtol=0, atol=1e-12)
        for name, buffer in alone.named_buffers():
            assert torch.allclose(getattr(whole, branch).get_buffer(name), buffer, rtol=0, atol=1e-12)

    def test_it_starts_from_the_middle(self) -> None:
        fresh = ChannelEquilibrium(8, group_size=4).double()
        decorrelated, reweighted = (copy.deepcopy(part)(images()) for part in (fresh.decorrelation, fresh.reweighting))
        assert torch.allclose(fresh(images()), 0.5 * (decorrelated + reweighted), rtol=0, atol=1e-12)

    def test_the_running_whitening_is_the_mean_of_the_batches(self) -> None:
        made, expected = BatchDecorrelation(8, momentum=0.3).double(), torch.eye(8).double()
        for seed in range(3):
            made(images(seed))
            sigma = torch.cov(images(seed).transpose(0, 1).flatten(1), correction=0)
            expected = 0.7 * expected + 0.3 * inverse_root(sigma, iterations=3, eps=1e-5)
        assert torch.allclose(made.running_whitening[0], expected, rtol=0, atol=1e-12)

    def test_in_eval_mode_it_is_a_convolution_in_groups(self) -> None:
        made = block("BD", training=False)
        weight = made.running_whitening.reshape(8, 4, 1, 1)
        assert torch.allclose(made(images()), F.conv2d(images(), weight, groups=2), rtol=0, atol=1e-12)

    @each_block
    def test_in_eval_mode_nothing_is_learned(self, name: str) -> None:
        made = block(name, training=False)
        before = copy.deepcopy(made.state_dict())
        made(images(6))
        assert all(torch.equal(tensor, before[key]) for key, tensor in made.state_dict().items())

    @each_block
    @in_both_modes
    def test_gradients(self, name: str, training: bool) -> None:
        made = block(name, training=training, momentum=0.0)
        named = dict(made.named_parameters())

        def run(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(made, dict(zip(named, values, strict=True)), (x,))

        x = images(0, 3, 8, 2).requires_grad_()
        assert gradcheck(run, (x, *(parameter.detach().requires_grad_() for parameter in named.values())), atol=1e-4)

    def test_scale_tells_what_channels_are_multiplied_by(self) -> None:
        made = block(training=False)
        share = made.mixing.sigmoid()
        diagonal = made.decorrelation.running_whitening.diagonal(dim1=1, dim2=2).flatten()
        expected = share * diagonal + (1 - share) * 0.5 / made.reweighting.running_scale
        assert torch.allclose(made.scale(), expected)
        assert torch.allclose(made.decorrelation.scale(), diagonal)
        assert made.reweighting.scale().shape == ()


class TestInputs:
    @each_block
    @in_both_modes
    def test_positions_lie_in_any_shape(self, name: str, training: bool) -> None:
        x = images(0, 4, 8, 2, 3, 4)
        expected = block(name, training=training)(x.flatten(2))
        assert expected.shape == (4, 8, 24)
        for shape in [(4, 8, 6, 4), (4, 8, 2, 3, 4)]:
            assert torch.equal(block(name, training=training)(x.reshape(shape)).flatten(2), expected)

    @each_block
    @in_both_modes
    def test_channels_last_of_all(self, name: str, training: bool) -> None:
        for x in (images(0, 4, 8, 6), images(), images(0, 4, 8, 2, 3, 4)):
            expected = block(name, training=training)(x)
            found = block(name, training=training, channel_dim=-1)(x.movedim(1, -1).contiguous())
            assert torch.allclose(found.movedim(-1, 1), expected, rtol=0, atol=1e-12)
            assert found.is_contiguous()  # so that `view` works behind it as it does behind the norm

    @in_both_modes
    def test_without_positions_it_is_decorrelation_alone(self, training: bool) -> None:
        x = images()[..., :1, :1]
        for made in (block(training=training), block(training=training, channel_dim=-1)):
            alone = copy.deepcopy(made.decorrelation)
            assert torch.equal(made(x.flatten(1)), alone(x.flatten(1)))
        assert torch.equal(block("IR", training=training)(x), x)
        assert torch.equal(block(training=training)(x), block(training=training)(x.flatten(1)).view_as(x))

    @each_block
    @in_both_modes
    @pytest.mark.parametrize("shape", [(1, 8, 3, 3), (1, 8, 1, 1), (1, 8), (5, 8)])
    @pytest.mark.parametrize("scale", [1.0, 0.0], ids=["noise", "constant"])
    def test_all_stays_finite(self, name: str, training: bool, shape: tuple[int, ...], scale: float) -> None:
        made = block(name, training=training, dtype=torch.float32)
        x = 2.0 + scale * torch.randn(shape)
        assert made(x).isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(made, x))
        assert all(tensor.isfinite().all() for tensor in made.state_dict().values())

    @each_block
    @in_both_modes
    @pytest.mark.parametrize(
        ("sizes", "layout"), [((3, 5), torch.channels_last), ((2, 3, 4), torch.channels_last_3d)], ids=["2d", "3d"]
    )
    def test_memory_is_laid_out_as_before(self, name: str, training: bool, sizes: Any, layout: Any) -> None:
        x = images(0, 4, 8, *sizes)
        expected = block(name, training=training)(x)
        found = block(name, training=training)(x.to(memory_format=layout))
        assert expected.is_contiguous()
        assert found.is_contiguous(memory_format=layout)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        plain, last = (gradients(block(name, training=training), y) for y in (x, x.to(memory_format=layout)))
        assert all(torch.allclose(*pair, rtol=0, atol=1e-10) for pair in zip(plain, last, strict=True))
        assert last[0].is_contiguous(memory_format=layout)

    @each_block
    @in_both_modes
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_comes_and_goes(self, name: str, training: bool, dtype: torch.dtype) -> None:
        x = images().to(dtype)
        made, expected = (block(name, training=training, dtype=torch.float32) for _ in range(2))
        found = made(x)
        assert found.dtype == dtype
        assert torch.equal(found, expected(x.float()).to(dtype))  # all between is in float32
        for key, tensor in made.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, expected.state_dict()[key])

    @each_block
    @in_both_modes
    def test_autocast_leaves_the_block_alone(self, name: str, training: bool) -> None:
        x = images().float()
        expected = block(name, training=training, dtype=torch.float32)(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = block(name, training=training, dtype=torch.float32)(x)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)

    def test_a_network_under_autocast_is_near_to_float32(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), Equilibrated(nn.BatchNorm2d(8), ChannelEquilibrium(8)), nn.ReLU())
        x, twin = torch.randn(8, 3, 6, 6), copy.deepcopy(net)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(x)
        assert relative_error([found.detach().float()], outputs(twin, x)) < 0.05
        found.float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())

    @each_block
    def test_half_precision_throughout(self, name: str) -> None:
        made = block(name, dtype=torch.bfloat16)
        x = images().bfloat16().requires_grad_()
        made(x).sum().backward()
        assert x.grad.isfinite().all()
        assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.bfloat16}
        assert made.eval()(x).dtype == torch.bfloat16

    def test_before_the_first_batch(self) -> None:
        x = images()
        assert torch.equal(BatchDecorrelation(8, group_size=4).double().eval()(x), x)
        fresh = ChannelEquilibrium(8).double().eval()
        gate = fresh.reweighting.gate(x.flatten(2).var(-1, correction=0))
        assert torch.allclose(fresh(x), (0.5 + 0.5 * gate[..., None, None]) * x, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("channels", "wanted", "taken"), [(24, 16, 12), (20, 16, 10), (13, 4, 1), (34, 16, 2), (8, 16, 8), (32, 16, 16)]
    )
    def test_groups_that_do_not_divide(
        self, channels: int, wanted: int, taken: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            made = ChannelEquilibrium(channels, group_size=wanted)
        assert made.decorrelation.running_whitening.shape == (channels // taken, taken, taken)
        said = f"Groups of {wanted} do not divide {channels} channels; these take groups of {taken}."
        assert caplog.messages == ([] if taken in (wanted, channels) else [said])
        assert made(images(0, 4, channels).float()).isfinite().all()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_channels": 0}, "`num_channels` is 1 or more; got 0"),
            ({"channel_dim": 2}, "`channel_dim` is 1 or -1; got 2"),
            ({"group_size": 0}, "`group_size` is 1 or more; got 0"),
            ({"iterations": 0}, "`iterations` of Newton's method are 1 or more; got 0"),
            ({"reduction": 0}, "`reduction` divides the channels, 1 or more; got 0"),
            ({"momentum": 1.5}, r"`momentum` is the weight of a new batch, in \[0, 1\]; got 1.5"),
            ({"momentum": float("nan")}, "`momentum` is the weight"),
            ({"eps": 0.0}, "`eps` is above 0; got 0.0"),
            ({"eps": float("nan")}, "`eps` is above 0; got nan"),
        ],
    )
    def test_arguments_out_of_their_range(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ChannelEquilibrium(**{"num_channels": 8, **arguments})

    @each_block
    @in_both_modes
    def test_another_number_of_channels_is_an_error(self, name: str, training: bool) -> None:
        """Twice as many too: they are not the channels of twice as many examples."""
        for channels in (4, 12, 16):
            with pytest.raises(RuntimeError):
                block(name, training=training)(images(0, 4, channels))

    def test_statistics_may_go_on_before_the_backward(self) -> None:
        """As with BatchNorm: run in eval mode, then in train mode, then backward."""
        made, x = block(training=False), images().requires_grad_()
        out = made(x).square().sum()
        made.train()(images(1))
        out.backward()
        assert torch.equal(x.grad, gradients(block(training=False), images())[0])

    @each_block
    def test_examples_one_by_one(self, name: str) -> None:
        """In train mode the statistics move, which torch.func has for no norm."""
        made, x = block(name, training=False), images()
        weights = dict(made.named_parameters())

        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(made, weights, (x.unsqueeze(0),)).square().sum()

        by_weight, by_input = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(weights, x)
        for index, example in enumerate(x):
            made.zero_grad()
            assert torch.allclose(by_input[index], gradients(made, example.unsqueeze(0))[0], rtol=0, atol=1e-10)
            for key, parameter in made.named_parameters():
                assert torch.allclose(by_weight[key][index], parameter.grad, rtol=0, atol=1e-10)


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), (6, 8)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), (4, 8, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(8), (4, 8, 2, 3, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(8, affine=True), (4, 8, 5, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), (4, 8, 5, 5)),
    "LayerNorm": (lambda: nn.LayerNorm(8), (4, 7, 8)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (4, 7, 8)),
}


@pytest.mark.parametrize("name", HOSTS)
def test_it_stands_behind_every_norm(name: str) -> None:
    make, shape = HOSTS[name]
    host = Equilibrated(make(), ChannelEquilibrium(8, group_size=4, channel_dim=channel_dim(make())))
    x = torch.randn(shape, requires_grad=True)
    fresh = copy.deepcopy(host)
    out = host(x)
    assert out.shape == shape
    assert torch.equal(out, fresh.equilibrium(fresh.norm(x)))
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert host.norm.weight.grad.abs().sum() > 0
    assert host.eval()(x).isfinite().all()


class TestCopies:
    @each_block
    def test_state_dicts(self, name: str) -> None:
        made, fresh = block(name), BLOCKS[name]().double()
        fresh.load_state_dict(made.state_dict())
        for training in (True, False):
            assert torch.equal(fresh.train(training)(images()), made.train(training)(images()))

    @each_block
    @in_both_modes
    def test_deepcopy_and_pickle(self, name: str, training: bool) -> None:
        made = block(name, training=training)
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(twin(images(5)), copy.deepcopy(made)(images(5)))
            assert twin.state_dict().keys() == made.state_dict().keys()

    @needs("torch", "2.6", "breaks the graph where autocast is asked for")
    @pytest.mark.parametrize(
        ("name", "training", "backend"),
        [
            pytest.param("CE", True, "aot_eager", marks=pytest.mark.slow),
            *(("CE", training, "eager") for training in (True, False)),
            *((branch, True, "eager") for branch in ("BD", "IR")),
        ],
    )
    def test_compiled(self, name: str, training: bool, backend: str) -> None:
        torch.compiler.reset()
        made, twin, x = block(name, training=training), block(name, training=training), images()
        compiled = torch.compile(made, backend=backend, fullgraph=True)
        assert torch.allclose(compiled(x), twin(x), rtol=0, atol=1e-12)
        for one, other in zip(gradients(compiled, x), gradients(twin, x), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-10)
        for key, tensor in made.state_dict().items():
            assert torch.allclose(tensor, twin.state_dict()[key], rtol=0, atol=1e-12)

    @needs("torch", "2.6", "exports with named dimensions only")
    @each_block
    def test_exported(self, name: str) -> None:
        made, x = block(name, training=False), images()
        free = torch.export.Dim.DYNAMIC
        exported = torch.export.export(made, (x,), dynamic_shapes=({0: free, 2: free},)).module()
        for other in (x, images(1, 7, 8, 4, 5)):
            assert torch.allclose(exported(other), made(other), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("where", [1, -1])
    def test_exported_to_onnx(self, where: int, tmp_path: Path) -> None:
        onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
        pytest.importorskip("onnxscript", reason="torch exports with onnxscript")
        made = block(training=False, dtype=torch.float32, channel_dim=where)
        x = images().float().movedim(1, where).contiguous()
        torch.onnx.export(made, (x,), str(tmp_path / "block.onnx"), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(tmp_path / "block.onnx"))
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert torch.allclose(torch.from_numpy(found), made(x), rtol=0, atol=1e-4)
