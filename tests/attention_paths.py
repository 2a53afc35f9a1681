"""What passes through some tokens alone: their keys and values held, and the gradient on the tokens before them."""

import torch


class HeldKeysAndValues:
    """Records the keys and values of some tokens at every layer, or puts other ones in their place.

    Args:
        model: a `Reconstructor`.
        held: (B, K) positions of the tokens.
        replay: what another one has `recorded`.
    """

    def __init__(self, model, held, replay=None):
        self.held, self.replay, self.recorded, self.handles = held, replay, [], []
        for layer in model.model.model.language_model.layers:
            for name in ("k_proj", "v_proj"):
                self.handles.append(getattr(layer.self_attn, name).register_forward_hook(self._hook))

    def _hook(self, module, inputs, output):
        sequences = torch.arange(len(output))[:, None]
        self.recorded.append(output[sequences, self.held].detach().clone())
        if self.replay is not None:
            output = output.clone()
            output[sequences, self.held] = self.replay[len(self.recorded) - 1]
            return output

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


def final_states(model, batch):
    """(B, T, D) of the language model in one forward pass of a `Reconstructor`."""
    captured = {}
    language_model = model.model.model.language_model
    handle = language_model.register_forward_hook(lambda m, i, o: captured.update(h=o.last_hidden_state))
    model(**batch)
    handle.remove()
    return captured["h"]


def gradients_before(model, batch, held, before):
    """The largest gradient of the token loss on the inputs `before` (B, T): free, and with keys and values held."""
    inputs = {}

    def keep(module, args, kwargs):
        inputs["embeds"] = kwargs["inputs_embeds"] = kwargs["inputs_embeds"].detach().requires_grad_()
        return args, kwargs

    handle = model.model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    model(**batch)["token"][0].backward()
    free = inputs["embeds"].grad[before].abs().max()
    with HeldKeysAndValues(model, held) as recorded, torch.no_grad():
        model(**batch)
    with HeldKeysAndValues(model, held, replay=recorded.recorded):
        model(**batch)["token"][0].backward()
    handle.remove()
    return free, inputs["embeds"].grad[before].abs().max()
