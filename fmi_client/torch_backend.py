"""Backend "fmi" of `torch.distributed`: process groups over this library's links.

    import torch.distributed as dist
    dist.init_process_group("fmi", init_method="fmi://host:10000/job?key=…", rank=r, world_size=n)

With any other `init_method` ("env://", as torchrun wants it, "file://…", or a `store`) the server
comes from the environment variable FMI_SERVER, and rank 0 tells the others the job's name and
key through torch's store. docs/torch.md says more.
"""

# torch's stubs have a second form of most methods, which torch.distributed never calls.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from fmi_client.background import Background, Begin
from fmi_client.calls import context_of
from fmi_client.communicator import Communicator
from fmi_client.torch_anysource import OP, recv_any
from fmi_client.torch_join import join_by_store, joined
from fmi_client.torch_monitor import monitor
from fmi_client.torch_profile import recorded
from fmi_client.torch_register import NAME, register
from fmi_client.torch_tensors import Reduction, Rooms, check_parts, flat, only, seconds, split
from fmi_client.torch_work import Work


def create(options: Any, backend_options: Any = None) -> FmiProcessGroup:
    """Make a process group; called by torch, with its `DistributedBackendOptions`.

    Raises:
        ValueError: there are options of a backend, which we have none of; or a group of a part of
            the ranks has no default group.
        FmiError: the job cannot be joined; see `fmi_client.connect`.
    """
    if backend_options is not None:
        raise ValueError(f"backend {NAME!r} takes no pg_options")
    rank, size = options.group_rank, options.group_size
    ranks = list(options.global_ranks_in_group)
    background = joined.background
    if background is None and not ranks:
        background = join_by_store(options.store, rank, size, options.timeout)
    if background is None:
        raise ValueError(f"a group of backend {NAME!r} needs a default group of that backend")
    _allow_monitored_barrier()
    name = str(options.group_id)
    context = context_of(f"{name} {joined.groups[name]}")
    joined.groups[name] += 1
    comm = background.comm.part(ranks or list(range(size)), context)
    comm.timeout = options.timeout.total_seconds()
    return FmiProcessGroup(background, comm, options.store, whole=not ranks)


class FmiProcessGroup(ProcessGroup):
    """A process group of some ranks of a job; methods and arguments are torch's.

    Tensors may be of any dtype, in any memory layout, on the CPU. Sparse ones can be summed. A
    failed collective ends the job on all its ranks and in all its groups: every later call
    raises `DistBackendError` with the same cause.

    Operations return a `Work` at once; what they take and fill is left alone until its ``wait``.
    Tensors that do not fit raise TypeError or ValueError. `opts` are torch's: root, reduce
    operation, timeout; None: torch's defaults.
    """

    def __init__(
        self, background: Background, comm: Communicator, store: Any, *, whole: bool
    ) -> None:
        super().__init__(comm.rank, comm.size)  # type: ignore[call-arg]  # see the stubs' note
        self._background = background
        self._comm = comm
        self._store = store
        self._whole = whole
        self._name: Any = ""
        self._desc = ""
        self._coalescing: list[Work] | None = None
        self._monitor = background.comm.part(comm.group, comm.context ^ 1)
        self._barriers = 0

    # ------------------------------------------------------------------ what it is called
    def name(self) -> str:
        """Return the backend's name."""
        return NAME

    getBackendName = _get_backend_name = name

    @property
    def group_name(self) -> Any:
        """The name under which torch keeps the group."""
        return self._name

    @property
    def group_desc(self) -> str:
        """What the program says the group is for."""
        return self._desc

    def _set_group_name(self, name: Any) -> None:
        self._name = name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    def getGroupName(self) -> Any:
        """Return `group_name`."""
        return self.group_name

    def getGroupDesc(self) -> str:
        """Return `group_desc`."""
        return self.group_desc

    setGroupName, setGroupDesc = _set_group_name, _set_group_desc

    def get_group_store(self) -> Any:
        """Return the store by which torch makes groups; not for data."""
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> Any:
        if device.type != "cpu":
            raise RuntimeError(f"backend {NAME!r} takes tensors of the CPU only, not of {device}")
        return self

    supports_splitting = supports_coalescing = supports_time_estimate = False

    # ------------------------------------------------------------------------- ending
    def set_timeout(self, timeout: timedelta) -> None:
        """Set the time of operations that say none themselves."""
        self._comm.timeout = timeout.total_seconds()

    setTimeout = _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """Leave the job, if this is the default group; a part of it leaves nothing."""
        if self._whole:
            self._background.close()
            if joined.background is self._background:
                joined.background = joined.store = None

    def abort(self) -> None:
        """End the job, on all ranks and in all its groups; the default group's also leaves it."""

        async def abort() -> None:
            self._comm.abort("abort() of the process group")

        self._run("abort", abort, []).wait()
        self.shutdown()  # torch forgets a default group that it has aborted

    def _set_sequence_number_for_group(self) -> None:
        """Collectives are numbered from the beginning, alike on all ranks."""

    def _get_sequence_number_for_group(self) -> int:
        return self._comm.seq

    # ----------------------------------------------------------------------- reductions
    def allreduce(self, tensors: Any, opts: Any = None) -> Work:
        """Replace the tensor by the combination of all ranks'; the same bits everywhere."""
        opts = opts or distributed.AllreduceOptions()
        tensor = only(tensors)
        reduction = Reduction(opts.reduceOp, self.size())
        return self._run(
            "allreduce", lambda: reduction.allreduce(self._comm, tensor, seconds(opts)), [tensor]
        )

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any) -> Work:
        """Do `allreduce` of several tensors, side by side."""
        reduction = Reduction(opts.reduceOp, self.size())

        def begin() -> Any:
            return _all([reduction.allreduce(self._comm, t, seconds(opts)) for t in tensors])

        return self._run("allreduce_coalesced", begin, tensors)

    def reduce(self, tensors: Any, opts: Any = None) -> Work:
        """Replace the root's tensor by the combination; the others' stay as they are."""
        opts = opts or distributed.ReduceOptions()
        tensor = only(tensors)
        reduction = Reduction(opts.reduceOp, self.size())

        def begin() -> Any:
            return reduction.reduce(self._comm, tensor, opts.rootRank, seconds(opts))

        return self._run("reduce", begin, [tensor])

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> Work:
        """Combine everybody's list of `size` tensors; ``outputs[0]`` gets the one of this rank."""
        whole = torch.stack([flat(each) for each in only(inputs)])
        return self._reduce_scatter("reduce_scatter", outputs, [whole], opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Combine everybody's `input`; `output` gets part `rank` of `size` equal ones, in memory.

        `input` has `size` times the elements of `output`.
        """
        return self._reduce_scatter("reduce_scatter_single", [output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Work:
        """Do `reduce_scatter_single` of several pairs, side by side."""
        return self._reduce_scatter("reduce_scatter_single_coalesced", outputs, inputs, opts)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _reduce_scatter(
        self, name: str, outputs: list[Tensor], inputs: list[Tensor], opts: Any
    ) -> Work:
        opts = opts or distributed.ReduceScatterOptions()
        reduction = Reduction(opts.reduceOp, self.size())
        for output, whole in zip(outputs, inputs, strict=True):
            check_parts(whole, output, self.size())

        def begin() -> Any:
            pairs = zip(outputs, inputs, strict=True)
            limit = seconds(opts)
            return _all([reduction.scatter(self._comm, out, all_, limit) for out, all_ in pairs])

        return self._run(name, begin, outputs, inputs=inputs)

    # ------------------------------------------------------------------- moving tensors
    def broadcast(self, tensors: Any, opts: Any = None) -> Work:
        """Fill everybody's tensor with the root's, of the same dtype and number of elements."""
        opts = opts or distributed.BroadcastOptions()
        tensor, root = only(tensors), opts.rootRank
        rooms = Rooms([] if self.rank() == root else [tensor])

        def begin() -> Any:
            obj = flat(tensor) if self.rank() == root else None
            out = None if self.rank() == root else rooms.flat[0]
            return self._comm.bcast(obj, root, out=out, timeout=seconds(opts))

        return self._run("broadcast", begin, [tensor], rooms)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
        """Fill ``outputs[0]``, a list of `size` tensors, with everybody's ``inputs[0]``."""
        return self._allgather("allgather", [only(outputs)], [only(inputs)], opts)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> Work:
        """Fill ``outputs[rank][i]`` with that rank's ``inputs[i]``."""
        by_input = list(zip(*outputs, strict=True))  # torch gives them by rank
        return self._allgather("allgather_coalesced", by_input, inputs, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Fill `output`, of `size` times the elements of `input`, with everybody's by rank."""
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Work:
        """Do `all_gather_single` of several pairs, side by side."""
        for output, part in zip(outputs, inputs, strict=True):
            check_parts(output, part, self.size())
        whole = Rooms(outputs)
        rows = [list(room.view(self.size(), -1 if room.numel() else 0)) for room in whole.flat]
        return self._allgather("all_gather_single", rows, inputs, opts, whole)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def _allgather(
        self,
        name: str,
        places: Sequence[Sequence[Tensor]],
        inputs: list[Tensor],
        opts: Any,
        whole: Rooms | None = None,
    ) -> Work:
        limit = seconds(opts)
        rooms = [Rooms(each) for each in places]

        def begin() -> Any:
            pairs = zip(inputs, rooms, strict=True)
            gathers = [self._comm.allgather(flat(i), out=r.flat, timeout=limit) for i, r in pairs]
            return _all(gathers)

        outputs = [tensor for each in places for tensor in each]
        filled = [*rooms, whole] if whole else rooms
        return self._run(name, begin, outputs, *filled, inputs=inputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        """Fill the root's ``outputs[0]``, `size` tensors, with everybody's ``inputs[0]``."""
        opts = opts or distributed.GatherOptions()
        root, tensor = opts.rootRank, only(inputs)
        rooms = Rooms(only(outputs) if self.rank() == root else [])

        def begin() -> Any:
            out = rooms.flat if self.rank() == root else None
            return self._comm.gather(flat(tensor), root, out=out, timeout=seconds(opts))

        return self._run("gather", begin, rooms.tensors, rooms, inputs=[tensor])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        """Fill ``outputs[0]`` with item `rank` of the root's ``inputs[0]``, `size` tensors."""
        opts = opts or distributed.ScatterOptions()
        root, rooms = opts.rootRank, Rooms([only(outputs)])
        items = only(inputs) if self.rank() == root else None

        def begin() -> Any:
            parts = None if items is None else [flat(each) for each in items]
            return self._comm.scatter(parts, root, out=rooms.flat[0], timeout=seconds(opts))

        return self._run("scatter", begin, rooms.tensors, rooms, inputs=items or [])

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        """Send ``inputs[i]`` to rank i, and fill ``outputs[i]`` with what it sent to us."""
        rooms = Rooms(outputs)

        def begin() -> Any:
            parts = [flat(each) for each in inputs]
            return self._comm.alltoall(parts, out=rooms.flat, timeout=seconds(opts))

        return self._run("alltoall", begin, outputs, rooms, inputs=inputs)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = None,
    ) -> Work:
        """Do `alltoall` with parts of one tensor along axis 0; no sizes: `size` equal parts."""
        outputs = split(output, output_split_sizes, self.size())
        return self.alltoall(outputs, split(input, input_split_sizes, self.size()), opts)

    alltoall_base = all_to_all_single

    # -------------------------------------------------------------------- point to point
    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Work:
        """Send one tensor to rank `dst` of the group."""
        tensor = only(tensors)
        return self._run("send", lambda: self._comm.send(flat(tensor), dst, tag), [tensor])

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Work:
        """Fill one tensor with what rank `src` of the group sent under `tag`."""
        rooms = Rooms([only(tensors)])

        async def receive() -> int:
            await self._comm.recv(src, tag, out=rooms.flat[0])
            return src

        return self._run("recv", receive, rooms.tensors, rooms)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Work:
        """Fill one tensor with what comes first; ``source_rank`` of the `Work` says from whom."""
        rooms = Rooms([only(tensors)])

        async def receive() -> int:
            source, got = await recv_any(self._comm, tag)
            rooms.fill(got)
            return source

        return self._run(OP, receive, rooms.tensors, rooms)

    # ------------------------------------------------------------------------- waiting
    def barrier(self, opts: Any = None) -> Work:
        """Return a `Work` that is over when all ranks have called this."""
        return self._run("barrier", lambda: self._comm.barrier(timeout=seconds(opts)), [])

    def monitored_barrier(
        self, timeout: timedelta | float | None = None, wait_all_ranks: bool = False
    ) -> None:
        """Block until all ranks are here; where some are not, all others hear which.

        Unlike after a `barrier` that failed, the group can still be used.

        Args:
            timeout: or seconds; default: the group's.
            wait_all_ranks: name all ranks that are late, not only the first.

        Raises:
            DistBackendError: some are late; the text names them.
        """
        number = self._barriers = self._barriers + 1
        if isinstance(timeout, timedelta):
            timeout = timeout.total_seconds()
        limit = self._comm.timeout if timeout is None else timeout

        def begin() -> Awaitable[None]:
            return monitor(self._monitor, number, limit, wait_all_ranks)

        self._run("monitored_barrier", begin, []).wait()

    # ------------------------------------------------------------------------ coalescing
    def _start_coalescing(self, device: torch.device) -> None:
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> Work:
        works, self._coalescing = self._coalescing or [], None

        def begin() -> Any:
            return _all([asyncio.wrap_future(work.done) for work in works])

        return self._run("coalesced operations", begin, [t for w in works for t in w.tensors])

    def _run(
        self,
        name: str,
        begin: Begin,
        tensors: Sequence[Tensor],
        *rooms: Rooms,
        inputs: Sequence[Tensor] | None = None,
    ) -> Work:
        """Let the thread begin an operation, and put what came where it belongs.

        `inputs` are what a profiler shows of it, where that is not `tensors`.
        """
        begin = recorded(name, tensors if inputs is None else inputs, begin)
        done = self._background.submit(begin, [each.put_back for each in rooms])
        work = Work(f"rank {self._comm.world_rank}, {name}", done, tensors)
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work


async def _all(begun: Iterable[Awaitable[Any]]) -> None:
    """Wait for operations that go on side by side."""
    await asyncio.gather(*begun)


def _allow_monitored_barrier() -> None:
    """Let `torch.distributed.monitored_barrier`, which refuses all but gloo, take our groups."""
    theirs = distributed.distributed_c10d.monitored_barrier
    if hasattr(theirs, "__wrapped__"):
        return

    @wraps(theirs)
    def monitored_barrier(
        group: Any = None, timeout: timedelta | float | None = None, wait_all_ranks: bool = False
    ) -> None:
        ours = distributed.group.WORLD if group is None else group
        if isinstance(ours, FmiProcessGroup):
            ours.monitored_barrier(timeout, wait_all_ranks)
        else:
            theirs(group, timeout, wait_all_ranks)

    distributed.distributed_c10d.monitored_barrier = monitored_barrier
    distributed.monitored_barrier = monitored_barrier


register()
