"""NPC: reconstruction of a frame from its neighbours, behind convolutions with a blind spot (arXiv 2011.00406)."""

from recipes.npc.encoder import NpcEncoder as Encoder
from recipes.npc.method import NpcMethod as Method

__all__ = ["Encoder", "Method"]
