"""Several verification servers behind one address, by Ray Serve (extra ``wispprof[ray]``).

Each replica is the same server as ``wispprof serve`` runs: engine, step loop, doors. Serve starts them,
routes every new connection to one of them, keeps a connection there, and replaces a replica that died.
A session whose replica is lost is resumed by its edge, from its committed tokens, wherever Serve routes
it next; nothing here knows about that. The number of replicas follows the load level.
"""

from wispprof.runtime.replicas.deploy import deployment, serve_replicas
from wispprof.runtime.replicas.scaling import LoadLevelPolicy, wanted_replicas

__all__ = ["LoadLevelPolicy", "deployment", "serve_replicas", "wanted_replicas"]
