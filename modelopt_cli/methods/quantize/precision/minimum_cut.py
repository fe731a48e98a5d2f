"""Cheapest division of items into two sides, where pairs on different sides cost extra: a minimum cut.

Dinic, "Algorithm for solution of a problem of maximum flow in networks with power estimation", 1970; that
such costs are a cut: Greig, Porteous and Seheult, "Exact maximum a posteriori estimation for binary images",
1989.
"""

from collections import deque
from collections.abc import Mapping, Sequence

TINY = 1e-12
"""Relative to the largest cost: less than this is no capacity any more."""


def cheapest_side(costs: Sequence[tuple[float, float]], pairs: Mapping[tuple[int, int], float]) -> list[bool]:
    """The side of each item at which all costs together are least.

    Args:
        costs: of each item on the side False and on the side True, any finite numbers.
        pairs: for ``(a, b)``, the cost of a being on the side True and b on the side False, from 0 up.

    Returns:
        For each item, True or False. Of several cheapest divisions that with the fewest items on True.
    """
    source, sink = len(costs), len(costs) + 1
    graph = _Graph(len(costs) + 2)
    for item, (of_false, of_true) in enumerate(costs):
        least = min(of_false, of_true)
        graph.add(source, item, of_false - least)  # paid where the item is on the side of the sink, False
        graph.add(item, sink, of_true - least)
    for (a, b), cost in pairs.items():
        graph.add(a, b, cost)
    return graph.reached_when_full(source, sink)[: len(costs)]


class _Graph:
    """Edges with capacities; each has its reverse next to it."""

    def __init__(self, nodes: int) -> None:
        self.heads: list[int] = []
        self.room: list[float] = []
        self.edges: list[list[int]] = [[] for _ in range(nodes)]

    def add(self, tail: int, head: int, capacity: float) -> None:
        if capacity <= 0:
            return
        for end, start, room in ((head, tail, capacity), (tail, head, 0.0)):
            self.edges[start].append(len(self.heads))
            self.heads.append(end)
            self.room.append(room)

    def reached_when_full(self, source: int, sink: int) -> list[bool]:
        """Nodes that the source still reaches when no more flows to the sink."""
        least = TINY * max(self.room, default=0.0)
        while True:
            levels = self._levels(source, least)
            if levels[sink] < 0:
                return [level >= 0 for level in levels]
            following = [0] * len(self.edges)
            while self._push(source, sink, levels, following, least) > least:
                pass

    def _levels(self, source: int, least: float) -> list[int]:
        levels, waiting = [-1] * len(self.edges), deque([source])
        levels[source] = 0
        while waiting:
            node = waiting.popleft()
            for edge in self.edges[node]:
                if self.room[edge] > least and levels[self.heads[edge]] < 0:
                    levels[self.heads[edge]] = levels[node] + 1
                    waiting.append(self.heads[edge])
        return levels

    def _push(self, source: int, sink: int, levels: list[int], following: list[int], least: float) -> float:
        """Let as much flow along one shortest path as it takes; 0 where there is none."""
        path: list[int] = []
        node = source
        while node != sink:
            while following[node] < len(self.edges[node]):
                edge = self.edges[node][following[node]]
                if self.room[edge] > least and levels[self.heads[edge]] == levels[node] + 1:
                    break
                following[node] += 1
            else:
                if not path:
                    return 0.0
                last = path.pop()  # a dead end: back, and never again
                node = self.heads[last ^ 1]
                following[node] += 1
                continue
            path.append(edge)
            node = self.heads[edge]
        flow = min(self.room[edge] for edge in path)
        for edge in path:
            self.room[edge] -= flow
            self.room[edge ^ 1] += flow
        return flow
