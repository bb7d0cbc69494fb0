"""The most that a linear margin can grow inside ball and box: closed forms that attacks are held to."""

import torch


def best_gain(w, x, y, eps, norm):
    """Return (N,): the largest growth of the wrong class's margin, for a two-class net with margin gradient ``w``."""
    pull = w.double().flatten() * (1 - 2 * y.double()).view(-1, 1)
    pixels, size = x.double().flatten(1), pull.abs()
    room = torch.where(pull > 0, 1 - pixels, pixels)
    if norm == "inf":
        return (size * room.clamp(max=eps)).sum(1)
    if norm == "1":  # a knapsack: the dearest values first
        order = size.argsort(1, descending=True)
        rooms = room.gather(1, order)
        taken = (eps - (rooms.cumsum(1) - rooms)).clamp(min=0).minimum(rooms)
        return (size.gather(1, order) * taken).sum(1)
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e6).double()
    for _ in range(200):  # min(s |w|, room) for the largest s that keeps the length at eps
        middle = (low + high) / 2
        long = (size * middle).minimum(room).norm(dim=1, keepdim=True) > eps
        low, high = torch.where(long, low, middle), torch.where(long, middle, high)
    return (size * (size * low).minimum(room)).sum(1)
