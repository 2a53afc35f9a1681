"""What passes through some tokens alone: their keys and values held, and the gradient on the tokens before them."""

import torch
from patching import HeldKeysAndValues


def final_states(model, batch):
    """(N, D) of the language model in one forward pass of a `Reconstructor`."""
    captured = {}
    language_model = model.model.model.language_model
    handle = language_model.register_forward_hook(lambda m, i, o: captured.update(h=o.last_hidden_state))
    model(**batch)
    handle.remove()
    return captured["h"][0]


def gradients_before(model, batch, held, before):
    """The largest gradient of the token loss on the inputs `before` (N,): free, and with keys and values held."""
    inputs = {}

    def keep(module, args, kwargs):
        inputs["embeds"] = kwargs["inputs_embeds"] = kwargs["inputs_embeds"].detach().requires_grad_()
        return args, kwargs

    handle = model.model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    model(**batch)["token"][0].backward()
    free = inputs["embeds"].grad[0, before].abs().max()
    with HeldKeysAndValues(model, held) as recorded, torch.no_grad():
        model(**batch)
    with HeldKeysAndValues(model, held, replay=recorded.recorded):
        model(**batch)["token"][0].backward()
    handle.remove()
    return free, inputs["embeds"].grad[0, before].abs().max()
