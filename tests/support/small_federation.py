"""A Flower run without its processes: the coordinator's messages go straight to the sites' functions."""

from federated import client
from federated.server import coordinate
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class Here(Grid):
    """Nodes of this process, each with its own configuration and state.

    Args:
        configs: of the nodes, by their id.
        spoil: changes a node's reply, given its configuration, before it is delivered.
    """

    run = None

    def __init__(self, configs, spoil=None):
        self.spoil, self.sent = spoil, []
        self.contexts = {}
        for node, config in configs.items():
            self.contexts[node] = Context(1, node, config, RecordDict(), {})

    def set_run(self, run):
        """Do nothing: there is one run."""

    def get_node_ids(self):
        return list(self.contexts)

    def create_message(self, *given):
        raise NotImplementedError

    push_messages = pull_messages = create_message

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            self.sent.append(message)
            node = message.metadata.dst_node_id
            try:
                reply = client.app(message, self.contexts[node])
            except Exception as error:
                reply = Message(Error(0, str(error)), reply_to=message)
            if self.spoil:
                self.spoil(reply, self.contexts[node].node_config)
            replies.append(reply)
        return replies


def run_here(settings, spoil=None):
    """Run an exchange of simulated sites; give the grid, which has all messages."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    configs = {}
    for number in range(settings.sites):
        configs[100 + number] = {"partition-id": number, "num-partitions": settings.sites}
    grid = Here(configs, spoil)
    coordinate(grid, settings)
    return grid
