// D[m, n] = A[m, k] @ B[n, k].T for sm_90a with the epilogue of epilogue.h, for int8, e4m3 and bf16.
//
//   producer warpgroup            consumer warpgroups                       copy engine
//   one thread: TMA loads  ->  ring of STAGES tiles in shared memory
//                              wgmma, accumulators in registers
//                              finish, round, stmatrix  ->  two buffers  ->  TMA store
//
// Blocks stay and take tile after tile: while the consumers finish one tile the producer fills the ring for the next,
// and stores drain behind the next tile's products. A stage holds 128 bytes of K of TILE_M rows of the first operand
// and of TILE_N rows of the second, in the 128-byte swizzle that TMA writes and wgmma reads.
//
// The first operand lies on wgmma's M (64 rows an instruction), the second on its N (8 to 256). Usually they are A
// and B. SWAP exchanges them, for few rows of A: the weights then fill the 64 rows and only the tile of A shrinks.
//
// Work: TILE_M = 64 * MI rows a consumer. Cooperative: the consumers split one tile. PINGPONG: each takes a tile of
// its own and the products of one hide the epilogue of the other. With CLUSTER 2 two blocks with neighbouring first
// tiles fetch half of the second tile each and multicast it to both.
//
// SPLIT: the blocks of a cluster take one tile together, each a part of K, where there are too few tiles to occupy the
// GPU. Then every block finishes its own columns of the accumulators: it receives the others' partial sums in its
// buffers, written by them, and adds all in the order of their parts of K, so that every run gives the same bits:
//
//   sender    wait for room   write into the owner's buffers   arrive on the owner's `partials`
//   owner     wait for partials   add   arrive on every sender's `room`
//
// Nothing but the cluster takes part: no memory is set aside, and launches on any streams do not meet.
//
// STREAM (stream-K): the first `whole` tiles are dealt out one by one; the others, which would not fill the last wave,
// are laid end to end along K and cut into one equal share a block. Where a share ends within a tile, its sums are left
// in `pieces`; whoever arrives last at a tile adds its pieces in the order of K, so that every run gives the same bits.
#include "epilogue.h"
#include "tiles.h"

#ifndef STREAM
#define STREAM 0
#endif
#if STREAM
#define STREAM_PARAMETERS , U32x4 *pieces, uint32_t *arrivals, int whole, int share, int extra
#else
#define STREAM_PARAMETERS
#endif

using namespace qk;
using namespace qk::epilogue;
using Type = TYPE;
using Accumulator = Type::Accumulator;

constexpr int ROW = 128;                                 // bytes of K in a stage
constexpr int SHARED_ROWS = PINGPONG ? 1 : CONSUMERS;    // consumers that split a tile
constexpr int TILE_M = 64 * MI * SHARED_ROWS;
constexpr int SECOND = TILE_M * ROW;                     // where the second operand lies in a stage
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * ROW;
constexpr int BLOCKS = CLUSTER * SPLIT;                  // of a cluster
static_assert(CLUSTER == 1 || SPLIT == 1, "a cluster shares a tile of the second operand, or K");
static_assert(SPLIT == 1 || !PINGPONG, "the consumers of a split tile work side by side");
static_assert(!STREAM || (BLOCKS == 1 && !PINGPONG), "single blocks have shares, their consumers work side by side");

// Blocks that finish columns, and how many columns of the accumulators each.
constexpr int OWNERS = TILE_N / SPLIT >= 16 ? SPLIT : TILE_N / 16;
constexpr int OWNED = TILE_N / OWNERS;

// The epilogue works in pieces of at most 8 KB of output, PIECE columns of the accumulators each. A staged row is 128
// bytes, or 64 of one-byte elements.
constexpr int BUFFER_BYTES = 8192;
constexpr int STAGED_ROW = ELEMENT_BYTES == 1 ? 64 : 128;
constexpr int WIDEST = SWAP ? (ELEMENT_BYTES == 4 ? 32 : 64) : STAGED_ROW / ELEMENT_BYTES;
constexpr int PIECE = OWNED < WIDEST ? OWNED : WIDEST;
constexpr int PIECES = OWNED / PIECE;
// What a thread holds of factors and residuals at a time: those of a piece, or of a half of it where there are many and
// the accumulators leave little room.
constexpr bool MANY = RESIDUAL != RESIDUAL_NONE || ZERO_POINT != SCALE_NONE;
constexpr int SPAN = MANY && MI * TILE_N >= 192 && PIECE > 32 ? 32 : PIECE;
constexpr int SPANS = PIECE / SPAN;
// Narrow tiles have registers to hold their factors through the products, and are too short to wait for them after.
constexpr bool FETCH_EARLY = MI * TILE_N <= 64;
static_assert(OWNED % PIECE == 0 && OWNED * OWNERS == TILE_N, "TILE_N is a whole number of pieces");
static_assert(SWAP || !TMA_STORE || PIECE == WIDEST, "a stored row is whole");
static_assert(PIECE % 16 == 0, "stmatrix writes 16 columns");

// Partial sums travel in rounds of ROUND registers of every thread, as many as both buffers hold of all senders.
constexpr int HELD = MI * OWNED / 2;
QK_PURE constexpr int fitting(int count, int limit) { return count <= limit ? count : fitting(count / 2, limit); }
constexpr int ROUND = fitting(HELD, 2 * BUFFER_BYTES / 512 / (SPLIT > 1 ? SPLIT - 1 : 1));
constexpr int ROUNDS = HELD / ROUND;
static_assert(ROUND * ROUNDS == HELD, "partial sums are a whole number of rounds");

#include "staging.h"

QK_FUNCTION uint64_t descriptor(uint32_t address) { return matrix_descriptor(address, 0, 1024, Swizzle::BYTES_128); }
// What to add to a descriptor to move it on: its address counts 16 bytes and has room for all of shared memory.
QK_FUNCTION uint64_t advance(int bytes) { return bytes >> 4; }

// A tile and its steps of K: what a block does next. The producer and the consumers ask in the same way.
struct Segment { int tile, begin, end; };
// Tiles up to `whole`, `stride` apart; then steps `at` … `end` of the tiles behind them, laid end to end.
struct Schedule { int tile, stride, whole, at, end; };
QK_FUNCTION bool take(Schedule& schedule, int steps, Segment& segment) {
  if (schedule.tile < schedule.whole) {
    segment = {schedule.tile, 0, steps};
    schedule.tile += schedule.stride;
    return true;
  }
  if (!STREAM || schedule.at >= schedule.end) return false;
  const int tile = schedule.at / steps, begin = schedule.at - tile * steps;
  const int left = schedule.end - schedule.at;
  segment = {schedule.whole + tile, begin, left < steps - begin ? begin + left : steps};
  schedule.at += segment.end - begin;
  return true;
}
#if STREAM
// The shares are of `share` steps, the first `extra` of them of one more.
QK_FUNCTION int start_of_share(int block, int share, int extra) {
  return block * share + (block < extra ? block : extra);
}
QK_FUNCTION int share_of(int unit, int share, int extra) {
  const int longer = extra * (share + 1);
  return unit < longer ? unit / (share + 1) : extra + (unit - longer) / share;
}
constexpr int VECTORS = MI * (TILE_N / 8);  // of four, of a thread's sums
QK_FUNCTION Accumulator number_of(uint32_t bits) {
  Accumulator x;
  memcpy(&x, &bits, 4);
  return x;
}
#endif

QK_CLUSTER_KERNEL(128 * (CONSUMERS + 1), 1, BLOCKS)
gemm_sm90(const QK_GRID_CONSTANT TensorMap map_first, const QK_GRID_CONSTANT TensorMap map_second,
          const QK_GRID_CONSTANT TensorMap map_d, uint8_t* d, int row_bytes, EPILOGUE_PARAMETERS STREAM_PARAMETERS) {
  const uint32_t base = shared_base(), buffers = base + STAGES * STAGE_BYTES;
  const uint32_t full = buffers + (TMA_STORE || SPLIT > 1 ? CONSUMERS * 2 * BUFFER_BYTES : 0);
  const uint32_t empty = full + 8 * STAGES;
  const uint32_t turns = empty + 8 * STAGES;  // PINGPONG: whose products may start
  const uint32_t partials = turns + 8 * 2, room = partials + 8 * CONSUMERS;  // SPLIT: one of each a consumer
  const int tid = threadIdx.x;
  const int warpgroup = shuffle(tid / 128, 0);  // the compiler sees that a warp's threads agree
  const int rank = BLOCKS > 1 ? cluster_rank() : 0;
  const int all_steps = (row_bytes + ROW - 1) / ROW;
  const int first_step = SPLIT > 1 ? all_steps * rank / SPLIT : 0;
  const int steps = SPLIT > 1 ? all_steps * (rank + 1) / SPLIT - first_step : all_steps;  // at least one
  const int first_size = SWAP ? n_size : m_size, second_size = SWAP ? m_size : n_size;
  const int tiles_first = (first_size + TILE_M * CLUSTER - 1) / (TILE_M * CLUSTER);
  const int tiles_second = (second_size + TILE_N - 1) / TILE_N;
  const int tiles = tiles_first * tiles_second;
  const int cluster = blockIdx.x / BLOCKS, clusters = gridDim.x / BLOCKS;
  const int place_in_pair = CLUSTER > 1 ? rank : 0;
  auto schedule_from = [&](int first_tile, int stride) {
#if STREAM
    return Schedule{first_tile, stride, whole, start_of_share(cluster, share, extra),
                    start_of_share(cluster + 1, share, extra)};
#else
    return Schedule{first_tile, stride, tiles, 0, 0};
#endif
  };

  if (tid == 0) {
    prefetch_tensor_map(&map_first);
    prefetch_tensor_map(&map_second);
    if (TMA_STORE) prefetch_tensor_map(&map_d);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, SHARED_ROWS * CLUSTER);
    }
    mbarrier_init(turns, 4);  // one arrival a warp, so that nobody is two phases behind
    mbarrier_init(turns + 8, 4);
    if (SPLIT > 1) {
      const int receivers = OWNERS - (rank < OWNERS ? 1 : 0);
      for (int c = 0; c < CONSUMERS; c++) {  // one arrival a warp
        mbarrier_init(partials + 8 * c, 4 * (SPLIT - 1));
        mbarrier_init(room + 8 * c, receivers > 0 ? 4 * receivers : 1);
      }
    }
    fence_mbarrier_init();
  }
  if (BLOCKS > 1) cluster_arrive();
  if (CLUSTER > 1) cluster_wait();  // SPLIT: who writes to other blocks waits for them then
  else block_sync();

  if (warpgroup == 0) {
    if (CONSUMERS > 1) decrease_registers<40>();
    // One thread, and the compiler knows: copies then need no loop over lanes.
    if (shuffle(tid / 32, 0) == 0 && elect_one()) {
      int s = 0;
      uint32_t parity = 1;  // the first round finds every stage empty
      Schedule schedule = schedule_from(cluster, clusters);
      Segment segment;
      QK_ROLLED while (take(schedule, steps, segment)) {
        const Place place = place_of<GROUP>(segment.tile, tiles_first, tiles_second);
        const int first = (place.first * CLUSTER + place_in_pair) * TILE_M, second = place.second * TILE_N;
        QK_ROLLED for (int step = segment.begin; step < segment.end; step++) {
          const uint32_t stage = base + s * STAGE_BYTES;
          mbarrier_wait_ring(empty + 8 * s, parity);
          mbarrier_arrive_expect(full + 8 * s, STAGE_BYTES);
          const int k = (first_step + step) * (ROW / 32) * Type::depth;
          tma_load(stage, &map_first, full + 8 * s, {k, first});
          if (CLUSTER == 1) {
            tma_load(stage + SECOND, &map_second, full + 8 * s, {k, second});
          } else {
            const int part = TILE_N / CLUSTER * rank;
            tma_load_multicast(stage + SECOND + part * ROW, &map_second, full + 8 * s, (1 << CLUSTER) - 1,
                               {k, second + part});
          }
          if (++s == STAGES) {
            s = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
    if (CONSUMERS > 1) increase_registers<232>();
    const int consumer = warpgroup - 1, thread = tid % 128, warp = thread / 32, lane = tid % 32;
    const Output output = EPILOGUE_OUTPUT;
    // A stage is free when the consumers of every block that the multicast reaches have read it.
    auto release = [&](int s) {
      if (thread < CLUSTER) {
        if (CLUSTER == 1) mbarrier_arrive(empty + 8 * s);
        else mbarrier_arrive_ring(map_to_rank(empty + 8 * s, thread));
      }
    };
    // SPLIT: this consumer's buffers here, and in the same place of the other blocks.
    const uint32_t own_buffers = buffers + consumer * 2 * BUFFER_BYTES;
    const bool owner = rank < OWNERS;
    auto grant_room = [&] {
      if (lane == 0)
        QK_UNROLL for (int source = 0; source < SPLIT; source++)
          if (source != rank) mbarrier_arrive_remote(map_to_rank(room + 8 * consumer, source));
    };
    int s = 0, buffer = 0, round = 0, exchanges = 0;
    uint32_t parity = 0;
    auto skip = [&](int count) {  // PINGPONG: past the stages that the other consumer takes
      const int rounds = (s + count) / STAGES;
      s += count - rounds * STAGES;
      parity ^= rounds & 1;
    };
    if (PINGPONG && consumer == 1) skip(steps);
    Schedule schedule =
        schedule_from(cluster + (PINGPONG ? consumer * clusters : 0), (PINGPONG ? CONSUMERS : 1) * clusters);
    Segment segment;
#if STREAM
    const uint32_t flags = partials + 8 * consumer;  // of each piece, whether it was the last to arrive
    int left[2] = {-1, -1};  // tiles of which a piece was left: where the share begins, and where it ends
    int looked = -1;         // of the two, whose arrivals were looked at last
#endif
    while (true) {
      const bool more = take(schedule, steps, segment);
      if (!STREAM && !more) break;
#if STREAM
      if (!more) {
        if (looked < 0) {
          // Pieces are made known when the products are done: by then their sums have long left, and nobody waits.
          barrier_sync(1 + consumer, 128);
          if (thread == 0) {
            QK_UNROLL for (int p = 0; p < 2; p++)
              if (left[p] >= 0) {
                const int begin = (left[p] - whole) * steps;
                const uint32_t others = share_of(begin + steps - 1, share, extra) - share_of(begin, share, extra);
                uint32_t* const counter = arrivals + (left[p] - whole) * CONSUMERS + consumer;
                const bool is_last = atomic_add_acq_rel(counter, 1) == others;
                if (is_last) st_global(counter, 0u);  // for the next launch
                st_shared<uint32_t>(flags + 4 * p, is_last);
              }
          }
          barrier_sync(1 + consumer, 128);
        }
        if (++looked == 2) break;
        segment.tile = looked == 0 ? left[0] : left[1];
        if (segment.tile < 0 || !ld_shared<uint32_t>(flags + 4 * looked)) continue;
      }
      const int first_unit = (segment.tile - whole) * steps;  // of the steps that are cut
      // Each share leaves two pieces at most: that of the tile it begins in, and that of the tile it ends in.
      auto slot_of = [&](int block) {
        const int64_t slot = int64_t(block) * 2 + (start_of_share(block, share, extra) < first_unit);
        return pieces + slot * (VECTORS * 128 * CONSUMERS) + tid - 128;
      };
#endif
      const Place place = place_of<GROUP>(segment.tile, tiles_first, tiles_second);
      const int first = (place.first * CLUSTER + place_in_pair) * TILE_M + (PINGPONG ? 0 : consumer * MI * 64);
      const int second = place.second * TILE_N;
      // Consumer 0 goes first: its round r follows consumer 1's round r - 1.
      if (PINGPONG) mbarrier_wait_ring(turns + 8 * consumer, (round & 1) ^ (consumer == 0));

      // Row 16 warp + lane / 4 + 8 h, columns 8 j + 2 (lane % 4) + e of the accumulators are this thread's.
      const int down = warp * 16 + lane / 4, across = lane % 4 * 2;
      const int owned = second + (SPLIT > 1 && owner ? rank * OWNED : 0);  // the first column that is finished here
      // Factors of a span's columns are on their way while the span before is finished; where they are many, only
      // while it is stored.
      constexpr int EACH = SPAN / 4;
      Across columns[2][EACH];
      Down rows[MI][2];
      auto fetch = [&](int span) {
        QK_UNROLL for (int j = 0; j < EACH; j += 2)
          fetch_pair(output, owned + span % (PIECES * SPANS) * SPAN + j * 4 + across, columns[span % 2][j],
                     columns[span % 2][j + 1]);
      };
      auto fetch_first = [&] {
        fetch(0);
        QK_UNROLL for (int i = 0; i < MI; i++)
          QK_UNROLL for (int h = 0; h < 2; h++) fetch_factors(output, first + i * 64 + down + 8 * h, rows[i][h]);
      };
      if (SPLIT > 1 && TMA_STORE && owner && exchanges > 0) {  // the last tile's stores have left the buffers
        if (thread == 0) store_wait_read<0>();
        barrier_sync(1 + consumer, 128);
        grant_room();
      }
      if (FETCH_EARLY) fetch_first();

      Registers<Accumulator, TILE_N / 2> sum[MI];
      if (STREAM) {  // whoever adds pieces up begins with nothing, and so do products
        QK_UNROLL for (int i = 0; i < MI; i++)
          QK_UNROLL for (int at = 0; at < TILE_N / 2; at++) sum[i][at] = 0;
      }
      if (!STREAM || more) {
        int previous = 0;
        const int count = STREAM ? segment.end - segment.begin : steps;
        for (int step = 0; step < count; step++) {
          mbarrier_wait_ring(full + 8 * s, parity);
          const uint64_t stage = descriptor(base) + advance(s * STAGE_BYTES);
          const uint64_t of_first = stage + advance(PINGPONG ? 0 : consumer * MI * 64 * ROW);
          const uint64_t of_second = stage + advance(SECOND);
          wgmma_fence();
          QK_UNROLL for (int k = 0; k < ROW / 32; k++)
            QK_UNROLL for (int i = 0; i < MI; i++)
              wgmma<Type, TILE_N>(sum[i], of_first + advance(i * 64 * ROW + k * 32), of_second + advance(k * 32),
                                  STREAM || step + k > 0);
          wgmma_commit();
          if (step > 0) {
            wgmma_wait<1>();
            release(previous);
          }
          previous = s;
          if (++s == STAGES) {
            s = 0;
            parity ^= 1;
          }
        }
        if (PINGPONG) {
          warp_sync();
          if (lane == 0) mbarrier_arrive(turns + 8 * (consumer ^ 1));
          skip(steps);
          round++;
        }

        if (!FETCH_EARLY && SPLIT == 1 && !STREAM) fetch_first();
        wgmma_wait<0>();
        QK_UNROLL for (int i = 0; i < MI; i++) wgmma_settle(sum[i]);
        release(previous);
      }
#if STREAM
      if (more && (segment.begin > 0 || segment.end < steps)) {
        // Bits of a copy, as below: `sum` itself must stay numbers.
        Registers<Accumulator, TILE_N / 2> piece[MI];
        QK_UNROLL for (int i = 0; i < MI; i++) {
          QK_UNROLL for (int at = 0; at < TILE_N / 2; at++) piece[i][at] = sum[i][at];
          wgmma_settle(piece[i]);
        }
        U32x4* const to = slot_of(cluster);
        QK_UNROLL for (int v = 0; v < VECTORS; v++) {
          const auto& of = piece[v / (TILE_N / 8)];
          const int at = v % (TILE_N / 8) * 4;
          st_global(to + v * 128 * CONSUMERS,
                    U32x4{bits_of(of[at]), bits_of(of[at + 1]), bits_of(of[at + 2]), bits_of(of[at + 3])});
        }
        if (left[0] < 0) left[0] = segment.tile;
        else left[1] = segment.tile;
        continue;
      }
      if (!more) {
        const int begin = share_of(first_unit, share, extra), end = share_of(first_unit + steps - 1, share, extra);
        QK_ROLLED for (int block = begin; block <= end; block++) {
          const U32x4* const from = slot_of(block);
          QK_UNROLL for (int v = 0; v < VECTORS; v++) {
            const U32x4 bits = ld_global(from + v * 128 * CONSUMERS);
            const Accumulator four[4] = {number_of(bits.x), number_of(bits.y), number_of(bits.z), number_of(bits.w)};
            auto& of = sum[v / (TILE_N / 8)];
            QK_UNROLL for (int e = 0; e < 4; e++) {
              const int at = v % (TILE_N / 8) * 4 + e;
              of[at] = of[at] + four[e];
            }
          }
        }
      }
      if (!FETCH_EARLY) fetch_first();
#endif

      // Finish what this block owns of the tile; `value(i, at)` is register `at` of the owned columns of rows 64 i.
      auto finish_tile = [&](auto value) {
        QK_UNROLL for (int turn = 0; turn < MI * PIECES * SPANS; turn++) {
          const int i = turn / (PIECES * SPANS), within = turn % (PIECES * SPANS);
          const int piece = within / SPANS, span = within % SPANS;
          const int r = first + i * 64, c = owned + within * SPAN;
          const Across(&of_columns)[EACH] = columns[turn % 2];
          if (!MANY && turn + 1 < MI * PIECES * SPANS) fetch(turn + 1);
          ResidualPair held[SPAN / 8][2];
          if (RESIDUAL != RESIDUAL_NONE && TMA_STORE) {
            QK_UNROLL for (int j = 0; j < SPAN / 8; j++)
              QK_UNROLL for (int h = 0; h < 2; h++)
                held[j][h] = fetch_residuals(output, r + down + h * 8, c + j * 8 + across);
          }
          const uint32_t to = own_buffers + buffer * BUFFER_BYTES;
          if (TMA_STORE && span == 0) {
            if (thread == 0) store_wait_read<1>();  // the store before last has left this buffer
            barrier_sync(1 + consumer, 128);
          }
          QK_UNROLL for (int j = 0; j < SPAN / 8; j += 2) {
            Pair pairs[4];  // columns 8 j with rows h = 0, 1, then columns 8 (j + 1)
            QK_UNROLL for (int q = 0; q < 4; q++) {
              const int h = q % 2, block = j + q / 2, at = within * (SPAN / 2) + block * 4 + h * 2;
              if (TMA_STORE) {
                float residual[2] = {0.0f, 0.0f};
                if (RESIDUAL != RESIDUAL_NONE) residual_values(output, held[block][h], residual);
                pairs[q] = finish_pair(output, value(i, at), value(i, at + 1), rows[i][h], of_columns[block * 2],
                                       of_columns[block * 2 + 1], residual);
              } else {
                QK_UNROLL for (int e = 0; e < 2; e++)
                  store_one(output, d, value(i, at + e), rows[i][h], of_columns[block * 2 + e], r + down + h * 8,
                            c + block * 8 + across + e);
              }
            }
            if (TMA_STORE) stage(to, warp, lane, span * (SPAN / 8) + j, pairs);
            if (MANY) warp_sync();  // lest the compiler begins the next ones too, and runs out of registers
          }
          if (MANY && turn + 1 < MI * PIECES * SPANS) fetch(turn + 1);
          if (!TMA_STORE || span + 1 < SPANS) continue;
          fence_proxy_async();
          barrier_sync(1 + consumer, 128);
          if (thread == 0) {
            const int start = owned + piece * PIECE;
            if (!SWAP) {
              tma_store(&map_d, to, {start, r});
            } else {
              tma_store(&map_d, to, {r, start});
              if (ELEMENT_BYTES == 4) tma_store(&map_d, to + PIECE * STAGED_ROW, {r + 32, start});
            }
            store_commit();
          }
          buffer ^= 1;
        }
      };

      if constexpr (SPLIT == 1) {
        finish_tile([&](int i, int at) { return sum[i][at]; });
      } else {
        if (exchanges == 0) cluster_wait();  // the other blocks run, and their barriers are ready
        // Partial sums leave as bits. Were bits taken of `sum` itself, the compiler would keep bits there, and convert
        // them before and after every wgmma.
        Registers<Accumulator, TILE_N / 2> part_sum[MI];
        QK_UNROLL for (int i = 0; i < MI; i++) {
          QK_UNROLL for (int at = 0; at < TILE_N / 2; at++) part_sum[i][at] = sum[i][at];
          wgmma_settle(part_sum[i]);
        }
        // Register `at` of the columns that block `o` owns. Registers have no addresses: one's own are picked.
        auto of_owner = [&](int o, int at) { return part_sum[at / (OWNED / 2)][o * (OWNED / 2) + at % (OWNED / 2)]; };
        auto of_mine = [&](int at) {
          Accumulator picked = of_owner(0, at);
          QK_UNROLL for (int o = 1; o < OWNERS; o++)
            if (rank == o) picked = of_owner(o, at);
          return picked;
        };
        Accumulator total[HELD];
        QK_UNROLL for (int part = 0; part < ROUNDS; part++) {
          if (!owner || OWNERS > 1) mbarrier_wait(room + 8 * consumer, (exchanges & 1) ^ 1);
          QK_UNROLL for (int o = 0; o < OWNERS; o++) {
            if (o == rank) continue;
            const int slot = rank < o ? rank : rank - 1;
            const uint32_t to = map_to_rank(own_buffers + slot * ROUND * 512 + thread * 4, o);
            QK_UNROLL for (int q = 0; q < ROUND; q++)
              st_cluster(to + q * 512, bits_of(of_owner(o, part * ROUND + q)));
          }
          warp_sync();
          if (lane == 0)  // after all of the stores, whose way is long
            QK_UNROLL for (int o = 0; o < OWNERS; o++)
              if (o != rank) mbarrier_arrive_remote(map_to_rank(partials + 8 * consumer, o));
          if (owner) {
            // Not before: there are registers for factors once those of this block's partial sums are free.
            if (!FETCH_EARLY && part + 1 == ROUNDS) fetch_first();
            mbarrier_wait(partials + 8 * consumer, exchanges & 1);
            QK_UNROLL for (int q = 0; q < ROUND; q++) {
              const Accumulator own = of_mine(part * ROUND + q);
              Accumulator added = 0;
              QK_UNROLL for (int source = 0; source < SPLIT; source++) {
                const int slot = source < rank ? source : source - 1;
                const uint32_t from = own_buffers + (slot * ROUND + q) * 512 + thread * 4;
                const Accumulator term = source == rank ? own : ld_shared<Accumulator>(from);
                added = source == 0 ? term : added + term;
              }
              total[part * ROUND + q] = added;
            }
            // After a tile's last round the buffers are needed for the output first. After the last tile's nobody
            // waits for room: whoever is done may leave.
            if (part + 1 < ROUNDS || (!TMA_STORE && segment.tile + clusters < tiles)) {
              warp_sync();
              grant_room();
            }
          }
          exchanges++;
        }
        if (owner) finish_tile([&](int i, int at) { return total[i * (OWNED / 2) + at]; });
      }
    }
    if (TMA_STORE && thread == 0) store_wait_read<0>();  // shared memory lasts as long as the block
  }
  if (CLUSTER > 1) {  // no block leaves while another may still write to it or arrive on its barriers
    cluster_arrive();
    cluster_wait();
  }
  // SPLIT: an owner has awaited all that is sent to it, and a sender all that it was granted.
  if (SPLIT > 1 && warpgroup == 0) cluster_wait();
}
QK_EXPORT(gemm_sm90)
