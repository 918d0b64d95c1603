"""Other models put on an adapted MODEL: what does not fit is refused, what fits counts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

HOOK = "CreateHookModelAsLoraModelOnly"


@pytest.mark.parametrize("node", ["ModelMergeSimple", "ModelMergeSubtract", "ModelMergeAdd"])
def test_an_unadapted_model_merged_after_the_adapter_is_refused_where_it_would_scale_what_is_new(
    fails, run, toys, node
):
    def build(g):
        model = toys.model(g)
        settings = {"ModelMergeSimple": {"ratio": 0.5}, "ModelMergeSubtract": {"multiplier": 1.0}}.get(node, {})
        merged = g.node(node, model1=toys.adapter(g, model), model2=model, **settings)
        return toys.ksampler(g, merged, toys.empty(g))

    if node == "ModelMergeSimple":
        message = fails(build)
        assert "x_embedder.proj.weight" in message and "before the DA-VAE Adapter" in message
    else:  # leaves out what does not fit, with a line in the log
        assert torch.isfinite(run(lambda g: {"x": build(g)})["x"]["samples"]).all()


def test_two_adapted_models_can_be_merged(run, toys):
    def build(g):
        adapted = toys.adapter(g, toys.model(g))
        merged = g.node("ModelMergeSimple", model1=adapted, model2=adapted, ratio=0.5)
        return {"one": toys.ksampler(g, adapted, toys.empty(g)), "two": toys.ksampler(g, merged, toys.empty(g))}

    out = run(build)
    assert torch.allclose(out["one"]["samples"], out["two"]["samples"], atol=1e-4)


def test_a_model_as_hook_is_refused_with_a_reason(comfy, fails, toys):
    state = toys.family.diffusion_model().state_dict()
    file = comfy.base / "models" / "checkpoints" / "style_hook.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file({f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in state.items()}, file)

    def build(g):
        node = toys.ksampler(g, toys.adapter(g, toys.model(g)), toys.empty(g))
        given = g.prompt[node.id]["inputs"]
        hook = g.node(HOOK, ckpt_name=file.name, strength_model=1.0)
        pair = g.node(
            "PairConditioningSetProperties",
            positive_NEW=given["positive"],
            negative_NEW=given["negative"],
            strength=1.0,
            set_cond_area="default",
            hooks=hook,
        )
        given["positive"], given["negative"] = pair[0], pair[1]
        return node

    message = fails(build)
    assert "x_embedder.proj.weight" in message and ", 16, 2, 2]" in message and ", 32, 2, 2]" in message
