"""Each private name of torch that the library uses, alone: a failure here says which one broke."""

import threading

import pytest
import torch
import torch.distributed.fsdp
import torch.nn.functional as F
from helpers.scripts import run_python
from torch import distributions as D
from torch import nn
from torch.distributions.kl import register_kl
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from ngd_optim import torch_internals as internals


def test_a_dispatch_mode_sees_what_autograd_calls():
    seen = []

    class Watching(internals.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    w = torch.ones(3, requires_grad=True)
    with Watching():
        (w * 2).sum().backward()
    assert torch.ops.aten.mul.Tensor in seen
    assert torch.ops.aten.expand.default in seen  # of the sum's gradient


def test_a_schema_tells_what_is_written():
    schema = internals.schema_of(torch.ops.aten.add_.Tensor)
    assert schema.is_mutable
    assert [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments] == [
        True,
        False,
        False,
    ]


def test_a_version_counts_writes():
    t = torch.zeros(2)
    before = internals.version_of(t)
    t[0] = 1
    assert internals.version_of(t) == before + 1


def test_a_view_has_a_base():
    t = torch.zeros(2)
    assert internals.base_of(t[:1]) is t
    assert internals.base_of(t) is None


def test_hooks_are_there_while_they_are_registered():
    w = nn.Parameter(torch.ones(2))
    assert not internals.hooks_of(w)
    handle = w.register_hook(lambda gradient: gradient)
    assert len(internals.hooks_of(w)) == 1
    handle.remove()
    assert not internals.hooks_of(w)


def test_a_node_knows_its_outputs():
    z = torch.ones(2, 3, requires_grad=True) * 2
    (one,) = internals.outputs_of(z.grad_fn)
    assert (tuple(one.shape), one.dtype) == ((2, 3), torch.float32)


def test_nodes_keep_what_matrix_products_and_convolutions_need():
    x, layer = torch.randn(4, 3), nn.Linear(3, 2)
    node = layer(x).grad_fn
    assert node.name() == "AddmmBackward0"
    assert torch.equal(internals.saved_by(node, "mat1"), x)
    assert internals.saved_by(node, "alpha") == internals.saved_by(node, "beta") == 1
    assert internals.saved_by(node, "nothing") is None
    image = torch.randn(1, 2, 5, 5)
    node = F.conv2d(image, nn.Parameter(torch.randn(4, 1, 3, 3)), padding=1, groups=2).grad_fn
    assert node.name() == "ConvolutionBackward0"
    assert torch.equal(internals.saved_by(node, "input"), image)
    assert (internals.saved_by(node, "groups"), internals.saved_by(node, "padding")) == (2, (1, 1))


def test_a_leaf_is_the_variable_of_its_node():
    w = nn.Parameter(torch.ones(2))
    node = (w * 2).grad_fn
    assert internals.variable_of(node.next_functions[0][0]) is w
    assert internals.variable_of(node) is None


def test_old_flags_of_losses_have_a_name():
    assert internals.reduction_of(None, None) == internals.reduction_of(True, True) == "mean"
    assert internals.reduction_of(False, None) == "sum"
    assert internals.reduction_of(None, False) == "none"


def test_the_kl_of_a_class_is_what_kl_divergence_calls():
    class Own(D.Normal):
        pass

    normal = internals.kl_function_of(D.Normal)
    pair = D.Normal(0.0, 1.0), D.Normal(1.0, 2.0)
    assert torch.equal(normal(*pair), D.kl_divergence(*pair))
    assert internals.kl_function_of(Own) is normal
    assert internals.kl_function_of(D.StudentT) is NotImplemented

    @register_kl(Own, Own)
    def own(p, q):
        return p.loc - q.loc

    assert internals.kl_function_of(Own) is own  # what was remembered is forgotten


def test_forward_mode_can_be_loaded_where_warnings_are_errors():
    load = "import torch, warnings; from ngd_optim import torch_internals as t; warnings.simplefilter('error'); "
    run_python(
        "-c",
        f"{load}t.load_forward_mode(); torch.func.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))",
    )


def test_attention_by_products_has_second_derivatives():
    q = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    found = internals.attend_by_products(q, q, q, None, 0.0, False, None, False)
    torch.testing.assert_close(found, ((q @ q.mT) / 2).softmax(-1) @ q)
    assert torch.autograd.gradgradcheck(
        lambda q: internals.attend_by_products(q, q, q, None, 0.0, True, 0.5, False), q
    )


@pytest.mark.parametrize("is_torch_2_7", [False, True])
def test_checkpoints_save_by_hooks(is_torch_2_7, monkeypatch):
    if is_torch_2_7:
        monkeypatch.setattr(internals, "_top_hooks", None)
    seen = []

    def look(x):
        seen.append(internals.saves_by_hooks())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(look, x, use_reentrant=False).sum().backward()
    assert seen == [True, True]  # it looks again where that is computed again
    torch.testing.assert_close(x.grad, x.detach().cos())
    assert not internals.saves_by_hooks()
    with torch.autograd.graph.disable_saved_tensors_hooks("disabled by the user"):
        assert not internals.saves_by_hooks()
        with pytest.raises(RuntimeError, match="disabled by the user"):
            checkpoint(look, x, use_reentrant=False)
    assert not internals.saves_by_hooks()


def test_dispatch_modes_of_two_threads_leave_no_flag_set():
    first, second = internals.DispatchMode(), internals.DispatchMode()
    turns = [threading.Event() for _ in range(2)]

    def other():
        turns[0].wait()
        with second:
            turns[1].set()
            left.wait()

    left = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    with first:
        turns[0].set()
        turns[1].wait()
    left.set()
    thread.join()
    assert not is_in_torch_dispatch_mode()


def test_flat_vectors_are_split_joined_and_copied():
    shapes = [(2, 3), (0, 4), (), (5,)]
    tensors = [torch.randn(shape) for shape in shapes]
    flat = internals.flatten_dense(tensors)
    assert torch.equal(flat, torch.cat([t.flatten() for t in tensors]))
    views = internals.unflatten_dense(flat, tensors)
    assert all(map(torch.equal, views, tensors))
    assert views[0].data_ptr() == flat.data_ptr()
    alone = internals.flatten_dense(tensors[:1])
    assert alone.data_ptr() != tensors[0].data_ptr()
    others = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
    internals.copy_all(others, tensors)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(others, tensors, strict=True))


def test_watched_zeros_have_memory():
    assert not internals.is_watched()
    with internals.RealZeros():
        assert internals.is_watched()
        assert not torch._efficientzerotensor((2,))._is_zerotensor()


def test_a_function_mode_that_is_gone_takes_no_other_from_the_stack():
    # As an interrupt leaves it that comes while torch has taken the mode from its stack.
    depth = internals._len_torch_function_stack()
    with internals.FunctionMode():
        with internals.FunctionMode():
            torch._C._pop_torch_function_stack()
        assert internals._len_torch_function_stack() == depth + 1
    assert internals._len_torch_function_stack() == depth


@pytest.mark.parametrize("way", ["function", "module", "method"])
def test_compiled_calls_are_seen_on_the_stack(way):
    seen = []

    class Look(torch.nn.Module):
        def forward(self, x):
            seen.append(internals.is_in_compiled_call())
            return x + 1

    module, x = Look(), torch.ones(2)
    assert not internals.is_in_compiled_call()
    with torch.compiler.set_stance("force_eager"):
        match way:
            case "function":
                torch.compile(module.forward, backend="eager")(x)
            case "module":
                torch.compile(module, backend="eager")(x)
            case "method":
                module.compile(backend="eager")
                module(x)
    assert seen == [True]
    assert not internals.is_in_compiled_call()
    torch.compiler.disable(module.forward)(x)  # as torch does with what its optimizers call
    assert seen == [True, False]


def test_states_of_sharded_modules_lead_to_their_weights(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        for module in (model[0], model):
            torch.distributed.fsdp.fully_shard(module, mesh=mesh)
        states = internals.fsdp_states()[-2:]
        assert [state._modules for state in states] == [(model[0],), (model,)]
        internals.begin_fsdp(states[-1])
        (group,) = internals.fsdp_groups_of(states[0])
        with internals.casting_only(states[0]):
            group.unshard()
            group.wait_for_unshard()
            weight = internals.whole_weight_of(group.fsdp_params[0])
            assert model[0].weight is weight
            output = model[0](torch.ones(1, 2))
            assert output.grad_fn.name() == "AddmmBackward0"
            assert not internals.hooks_of(output)
            group.reshard()
        assert model[0].weight is group.fsdp_params[0].sharded_param
    finally:
        torch.distributed.destroy_process_group()
