"""Starts a model off with the two attention heads that copying is made of.

Copying "... B C ... B" -> C takes a head that writes into each position which token came before it,
and in a later layer a head that looks for the position whose previous token is the current one
(an induction head, https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads).
A new model finds this pair late in its training; planted, it is there at once. Training is free to
change it. The planted weights are large, so that the first, noisy updates do not erase it.
"""

import torch

SHARP = 1.5  # initial weight of the query and key norms of both layers: higher is more selective
POSITION = 8  # how many rotary frequencies tell the previous token from its neighbours
CONTENT = 20  # the first frequency slow enough to compare content at any distance


def orthonormal(rows, columns):
    """Random directions at right angles to each other and to feature 0, the constant one."""
    directions = torch.linalg.qr(torch.randn(columns - 1, rows))[0].T
    return torch.nn.functional.pad(directions, (1, 0))


@torch.no_grad()
def plant(model):
    hidden, dim = model.config.hidden_size, model.config.head_dim
    half = dim // 2
    previous, match = (model.model.layers[i].self_attn for i in (0, 1))
    for attention in (previous, match):
        attention.q_norm.weight.fill_(SHARP)
        attention.k_norm.weight.fill_(SHARP)

    # Layer 0, head 0: query and key come from one constant feature only, the query turned back by
    # one position, so that after the rotary embedding they agree most at a distance of one.
    model.model.embed_tokens.weight.mul_(4)
    model.model.embed_tokens.weight[:, 0] = 0.5
    theta = model.config.rope_parameters["rope_theta"]
    angle = theta ** (-torch.arange(POSITION) / half)
    previous.k_proj.weight[:POSITION, 0] = 1.5
    previous.q_proj.weight[:POSITION, 0] = 1.5 * angle.cos()
    previous.q_proj.weight[half : half + POSITION, 0] = -1.5 * angle.sin()
    # What it reads from the previous token it writes where no token's embedding is read from.
    read, write = orthonormal(2 * dim, hidden).split(dim)
    previous.v_proj.weight[:dim] = read
    previous.o_proj.weight[:, :dim] = 0.3 * write.T

    # Layer 1, head 0: the query reads from the current token what the key reads from the previous
    # token's copy; the value goes back to the residual stream as the token it was.
    slow = [i for i in range(dim) if i % half >= CONTENT]
    match.q_proj.weight[:dim] = 0
    match.k_proj.weight[:dim] = 0
    match.q_proj.weight[slow] = 2 * read[slow]
    match.k_proj.weight[slow] = 2 * write[slow]
    value = orthonormal(dim, hidden)
    match.v_proj.weight[:dim] = value
    match.o_proj.weight[:, :dim] = 0.5 * value.T
