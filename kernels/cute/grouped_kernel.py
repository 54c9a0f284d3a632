"""The kernel of the grouped matrix product in CuTe DSL: TMA loads by one warp, wgmma by two warp groups, persistent.

After NVIDIA's example dense_gemm_persistent.py (CUTLASS, BSD-3-Clause). The walk over the experts' tiles is that of
kernels/triton/grouped_gemm.py: which expert a tile belongs to follows from the counts, which stay on the device. FP8 products are
taken up into fp32 sums after every 128 inputs, times their scales, as in DeepGEMM. Compiled for Hopper, not run on hardware.

E experts, N outputs, K inputs. M rows: in the masked layout the room of each expert; in the contiguous one all rows, each expert's
a multiple of 128, so that no tile has rows of two.
"""

from typing import Any

import cutlass
from cutlass import cute, pipeline, utils
from cutlass.utils import hopper_helpers

ROWS = 128
"""Rows of a tile, all of one expert."""
STORE_COLUMNS, STORE_STAGES, LOAD_STAGES = 32, 4, 4
WARP_GROUP = 128
"""Threads of a warp group; there are one that loads and two that multiply."""
LOAD_REGISTERS, MULTIPLY_REGISTERS = 40, 232


class GroupedGemm:
    """The kernel and its launch. a [M, K, E], b [N, K, E], out [M, N, E], K (N) fastest; counts int32 [E].

    With `scaled`, a and b are e4m3, and a_scales fp32 [M, K / 128, E], b_scales fp32 [N / 128, K / 128, E] belong to them. With
    `contiguous`, a, a_scales and out have 1 in E's place.
    """

    def __init__(self, *, num_blocks: int, scaled: bool, contiguous: bool) -> None:
        """`num_blocks`: how many blocks run at once, one on each multiprocessor."""
        self.num_blocks, self.scaled, self.contiguous = num_blocks, scaled, contiguous
        self.columns, self.depth = (128, 128) if scaled else (256, 64)

    @cute.jit
    def __call__(self, a: Any, b: Any, out: Any, a_scales: Any, b_scales: Any, counts: Any, stream: Any) -> None:
        tile = (ROWS, self.columns, self.depth)
        a_layout, b_layout = utils.LayoutEnum.from_tensor(a), utils.LayoutEnum.from_tensor(b)
        self.out_layout, self.out_type = utils.LayoutEnum.from_tensor(out), out.element_type
        tiled_mma = hopper_helpers.make_trivial_tiled_mma(
            a.element_type,
            b.element_type,
            a_layout.sm90_mma_major_mode(),
            b_layout.sm90_mma_major_mode(),
            cutlass.Float32,
            (2, 1, 1),
            tiler_mn=(64, self.columns),
        )
        a_shared = hopper_helpers.make_smem_layout_a(a_layout, tile, a.element_type, LOAD_STAGES)
        b_shared = hopper_helpers.make_smem_layout_b(b_layout, tile, b.element_type, LOAD_STAGES)
        store_tile = (ROWS, STORE_COLUMNS)
        out_shared = hopper_helpers.make_smem_layout_epi(self.out_type, self.out_layout, store_tile, STORE_STAGES)
        load, store = cute.nvgpu.cpasync.CopyBulkTensorTileG2SOp(), cute.nvgpu.cpasync.CopyBulkTensorTileS2GOp()
        atom = cute.nvgpu.cpasync.make_tiled_tma_atom
        a_copy, a_global = atom(load, a, cute.slice_(a_shared, (None, None, 0)), (ROWS, self.depth), num_multicast=1)
        b_copy, b_global = atom(load, b, cute.slice_(b_shared, (None, None, 0)), (self.columns, self.depth), num_multicast=1)
        out_copy, out_global = atom(store, out, cute.slice_(out_shared, (None, None, 0)), store_tile)
        self.step_bytes = cute.size_in_bytes(a.element_type, cute.slice_(a_shared, (None, None, 0)))
        self.step_bytes += cute.size_in_bytes(b.element_type, cute.slice_(b_shared, (None, None, 0)))
        a_room = cute.struct.MemRange[a.element_type, cute.cosize(a_shared)]
        b_room = cute.struct.MemRange[b.element_type, cute.cosize(b_shared)]
        out_room = cute.struct.MemRange[out.element_type, cute.cosize(out_shared)]

        @cute.struct
        class Shared:
            barriers: cute.struct.MemRange[cutlass.Int64, LOAD_STAGES * 2]
            a_tiles: cute.struct.Align[a_room, 1024]
            b_tiles: cute.struct.Align[b_room, 1024]
            out_tiles: cute.struct.Align[out_room, 1024]

        self.shared = Shared
        copies = (a_copy, a_global, b_copy, b_global, out_copy, out_global)
        self.kernel(*copies, tiled_mma, a_shared, b_shared, out_shared, a_scales, b_scales, counts).launch(
            grid=[self.num_blocks, 1, 1], block=[3 * WARP_GROUP, 1, 1], stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(
        self,
        a_copy: Any,
        a_global: Any,
        b_copy: Any,
        b_global: Any,
        out_copy: Any,
        out_global: Any,
        tiled_mma: Any,
        a_shared: Any,
        b_shared: Any,
        out_shared: Any,
        a_scales: Any,
        b_scales: Any,
        counts: Any,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for copy in (a_copy, b_copy, out_copy):
                cute.nvgpu.cpasync.prefetch_descriptor(copy)
        storage = utils.SmemAllocator().allocate(self.shared)
        loads = pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.barriers.data_ptr(),
            num_stages=LOAD_STAGES,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 8),
            tx_count=self.step_bytes,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        )
        a_tiles = storage.a_tiles.get_tensor(a_shared.outer, swizzle=a_shared.inner)
        b_tiles = storage.b_tiles.get_tensor(b_shared.outer, swizzle=b_shared.inner)
        out_tiles = storage.out_tiles.get_tensor(out_shared.outer, swizzle=out_shared.inner)
        a_parts = cute.local_tile(a_global, (ROWS, self.depth), (None, None, None))
        b_parts = cute.local_tile(b_global, (self.columns, self.depth), (None, None, None))
        out_parts = cute.local_tile(out_global, (ROWS, self.columns), (None, None, None))
        one = cute.make_layout(1)
        partition = cute.nvgpu.cpasync.tma_partition
        a_to, a_from = partition(a_copy, 0, one, cute.group_modes(a_tiles, 0, 2), cute.group_modes(a_parts, 0, 2))
        b_to, b_from = partition(b_copy, 0, one, cute.group_modes(b_tiles, 0, 2), cute.group_modes(b_parts, 0, 2))

        group = cute.arch.make_warp_uniform(thread // WARP_GROUP)
        multiply = tiled_mma.get_slice(cute.make_layout(2, stride=WARP_GROUP)(group - 1))
        a_fragment = tiled_mma.make_fragment_A(multiply.partition_A(a_tiles))
        b_fragment = tiled_mma.make_fragment_B(multiply.partition_B(b_tiles))
        total = cute.make_rmem_tensor(multiply.partition_C(out_parts).shape[:3], cutlass.Float32)
        product = cute.make_rmem_tensor(total.shape, cutlass.Float32) if self.scaled else total
        corner = multiply.partition_C(cute.make_identity_tensor((ROWS, self.columns)))[0]
        num_steps, num_columns = cute.size(a_parts, mode=[3]), cute.size(out_parts, mode=[3])
        num_experts = cute.size(counts)
        num_tiles = cutlass.Int32(0)
        for expert in range(num_experts):
            num_tiles += (counts[expert] + ROWS - 1) // ROWS * num_columns

        if group == 0:
            cute.arch.setmaxregister_decrease(LOAD_REGISTERS)
        if warp == 0:
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, LOAD_STAGES)
            tile = block
            while tile < num_tiles:
                expert, batch, row, column = self.place(tile, counts, num_experts, num_columns)
                a_steps, b_steps = a_from[(None, row, None, batch)], b_from[(None, column, None, expert)]
                state.reset_count()
                for _ in range(num_steps):
                    loads.producer_acquire(state)
                    barrier = loads.producer_get_barrier(state)
                    cute.copy(a_copy, a_steps[(None, state.count)], a_to[(None, state.index)], tma_bar_ptr=barrier)
                    cute.copy(b_copy, b_steps[(None, state.count)], b_to[(None, state.index)], tma_bar_ptr=barrier)
                    loads.producer_commit(state)
                    state.advance()
                tile += self.num_blocks
            loads.producer_tail(state)

        if group != 0:
            cute.arch.setmaxregister_increase(MULTIPLY_REGISTERS)
            read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, LOAD_STAGES)
            release = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, LOAD_STAGES)
            to_shared = hopper_helpers.sm90_get_smem_store_op(self.out_layout, elem_ty_d=self.out_type, elem_ty_acc=cutlass.Float32)
            matrices = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(self.out_layout.is_m_major_c(), 4), self.out_type)
            tiled_store = cute.make_tiled_copy_S(to_shared, cute.make_tiled_copy_C_atom(matrices, tiled_mma))
            own_store = tiled_store.get_slice(thread - WARP_GROUP)
            store_to = own_store.partition_D(out_tiles)
            store_from = tiled_store.retile(total)
            shape = cute.make_layout(cute.shape(own_store.partition_S(out_tiles))[:3]).shape
            piece, rounded = cute.make_rmem_tensor(shape, cutlass.Float32), cute.make_rmem_tensor(shape, self.out_type)
            piece_size = cute.size(piece)
            stores = pipeline.PipelineTmaStore.create(
                num_stages=STORE_STAGES, producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 2 * WARP_GROUP)
            )
            multipliers = pipeline.NamedBarrier(barrier_id=1, num_threads=2 * WARP_GROUP)
            tile, num_stored = block, cutlass.Int32(0)
            while tile < num_tiles:
                expert, batch, row, column = self.place(tile, counts, num_experts, num_columns)
                read.reset_count()
                release.reset_count()
                total.fill(0.0)
                if cutlass.const_expr(self.scaled):
                    own_row = row * ROWS + corner[0]
                    for step in range(num_steps):
                        upper, lower = self.scales(a_scales[None, step, batch], b_scales[column, step, expert], own_row)
                        loads.consumer_wait(read)
                        tiled_mma.set(cute.nvgpu.warpgroup.Field.ACCUMULATE, False)
                        cute.nvgpu.warpgroup.fence()
                        for k in cutlass.range_constexpr(cute.size(a_fragment, mode=[2])):
                            at = (None, None, k, read.index)
                            cute.gemm(tiled_mma, product, a_fragment[at], b_fragment[at], product)
                            tiled_mma.set(cute.nvgpu.warpgroup.Field.ACCUMULATE, True)
                        cute.nvgpu.warpgroup.commit_group()
                        cute.nvgpu.warpgroup.wait_group(0)
                        loads.consumer_release(read)
                        read.advance()
                        for element in cutlass.range_constexpr(cute.size(total)):
                            total[element] += product[element] * (upper if element // 2 % 2 == 0 else lower)
                else:
                    tiled_mma.set(cute.nvgpu.warpgroup.Field.ACCUMULATE, True)
                    cute.nvgpu.warpgroup.fence()
                    for step in range(num_steps):
                        loads.consumer_wait(read)
                        for k in cutlass.range_constexpr(cute.size(a_fragment, mode=[2])):
                            at = (None, None, k, read.index)
                            cute.gemm(tiled_mma, total, a_fragment[at], b_fragment[at], total)
                        cute.nvgpu.warpgroup.commit_group()
                        cute.nvgpu.warpgroup.wait_group(1)
                        if step > 0:
                            loads.consumer_release(release)
                            release.advance()
                        read.advance()
                    cute.nvgpu.warpgroup.wait_group(0)
                    loads.consumer_release(release)
                    release.advance()

                pieces = cute.zipped_divide(out_parts[(None, None, row, column, batch)], (ROWS, STORE_COLUMNS))
                piece_from, piece_to = partition(out_copy, 0, one, cute.group_modes(out_tiles, 0, 2), pieces)
                num_pieces = cute.size(pieces, mode=[1])
                order = cute.make_layout(pieces.shape[1], stride=(pieces.shape[1][1], 1))
                for index in cutlass.range_constexpr(num_pieces):
                    for element in cutlass.range_constexpr(piece_size):
                        piece[element] = store_from[index * piece_size + element]
                    rounded.store(piece.load().to(self.out_type))
                    buffer = (num_stored + index) % STORE_STAGES
                    cute.copy(tiled_store, rounded, store_to[(None, None, None, buffer)])
                    cute.arch.fence_proxy("async.shared", space="cta")
                    multipliers.arrive_and_wait()
                    if warp == WARP_GROUP // 32:
                        cute.copy(out_copy, piece_from[(None, buffer)], piece_to[(None, order.get_hier_coord(index))])
                        stores.producer_commit()
                        stores.producer_acquire()
                    multipliers.arrive_and_wait()
                num_stored += num_pieces
                tile += self.num_blocks
            stores.producer_tail()

    @cute.jit
    def place(self, tile: Any, counts: Any, num_experts: Any, num_columns: Any) -> Any:
        """Expert, batch, row and column of a tile; the rows of an expert run fastest, so that its weight is read once."""
        expert, first, end, row_tiles = cutlass.Int32(0), cutlass.Int32(0), cutlass.Int32(0), cutlass.Int32(1)
        for candidate in range(num_experts):
            own_rows = (counts[candidate] + ROWS - 1) // ROWS
            if tile >= end and tile < end + own_rows * num_columns:
                expert, first, row_tiles = cutlass.Int32(candidate), end, own_rows
            end += own_rows * num_columns
        row, column = (tile - first) % row_tiles, (tile - first) // row_tiles
        if cutlass.const_expr(self.contiguous):
            return expert, cutlass.Int32(0), first // num_columns + row, column
        return expert, expert, row, column

    @cute.jit
    def scales(self, of_rows: Any, of_weight: Any, own_row: Any) -> Any:
        """Of the two rows, eight apart, whose products a thread holds; a row past the room has the last one's, and no place."""
        last = cute.size(of_rows) - 1
        return of_rows[cutlass.min(own_row, last)] * of_weight, of_rows[cutlass.min(own_row + 8, last)] * of_weight
