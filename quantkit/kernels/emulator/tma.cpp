// Bulk copies: TMA loads with swizzle, out-of-bounds fill and multicast, TMA stores and reductions, flat copies.
#include "machine.h"

#include <algorithm>

namespace qk {
namespace emulator {

namespace {

// What quantkit.kernels.emulator.tensor_map packs into the 128 opaque bytes: cuTensorMapEncodeTiled's arguments.
struct Map {
  uint64_t magic, address;
  uint64_t size[5];    // elements, innermost first
  uint64_t stride[4];  // bytes, of dimensions 1 to 4
  uint16_t box[5];
  uint8_t data_type, element_bytes, rank, swizzle, fill;
};
static_assert(sizeof(Map) <= 128, "a tensor map has 128 bytes");
constexpr uint64_t MAGIC = 0x70616d726f736e74;  // "tnsormap"
constexpr int INT32 = 3, FLOAT32 = 7;           // CUtensorMapDataType

Map decode(const void* pointer, int rank) {
  Map map;
  memcpy(&map, pointer, sizeof map);
  if (map.magic != MAGIC)
    fail("tensor map", "these 128 bytes are no tensor map; pass it as a QK_GRID_CONSTANT parameter");
  if (map.rank != rank) fail("tensor map", "%d coordinates for a tensor map of %d dimensions", rank, map.rank);
  return map;
}

uint32_t box_bytes(const Map& map) {
  uint32_t bytes = map.element_bytes;
  for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

// 128-byte swizzle exchanges address bits 4-6 with 7-9 by xor, 64-byte bits 4-5 with 7-8, 32-byte bit 4 with 7.
uint32_t swizzle(uint32_t offset, int mode) {
  const uint32_t mask = mode == 3 ? 0x70 : mode == 2 ? 0x30 : mode == 1 ? 0x10 : 0;
  return offset ^ (offset >> 3 & mask);
}

// Call row(global address or null, elements before the row's first valid one, valid elements, shared offset) for
// each inner row of the box.
template <class F>
void for_each_row(const Map& map, const std::vector<int>& at, uint32_t offset, F row) {
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  uint32_t rows = 1;
  for (int i = 1; i < map.rank; i++) rows *= map.box[i];
  const int64_t first = std::clamp<int64_t>(-int64_t(at[0]), 0, map.box[0]);
  const int64_t end = std::clamp<int64_t>(int64_t(map.size[0]) - at[0], 0, map.box[0]);
  for (uint32_t r = 0; r < rows; r++) {
    uint64_t address = map.address;
    bool inside = end > first;
    for (uint32_t i = 1, rest = r; i < map.rank; rest /= map.box[i], i++) {
      const int64_t coordinate = int64_t(at[i]) + rest % map.box[i];
      inside = inside && coordinate >= 0 && coordinate < int64_t(map.size[i]);
      address += coordinate * map.stride[i - 1];
    }
    address += (int64_t(at[0]) + first) * map.element_bytes;
    row(inside ? reinterpret_cast<char*>(address) : nullptr, int(first), inside ? int(end - first) : 0,
        offset + r * row_bytes);
  }
}

void load_box(Block& block, const Map& map, const std::vector<int>& at, uint32_t offset) {
  const int row_bytes = map.box[0] * map.element_bytes;
  std::vector<uint8_t> row(row_bytes);
  for_each_row(map, at, offset, [&](const char* source, int first, int valid, uint32_t to) {
    // CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA writes a special NaN; here every byte is 0xff.
    std::fill(row.begin(), row.end(), map.fill ? 0xff : 0);
    if (valid) memcpy(&row[first * map.element_bytes], source, size_t(valid) * map.element_bytes);
    for (int i = 0; i < row_bytes; i += 16) memcpy(&block.shared[swizzle(to + i, map.swizzle)], &row[i], 16);
  });
}

// Read the box out of shared memory, in the order of its rows.
std::vector<uint8_t> gather_box(const Block& block, const Map& map, uint32_t offset) {
  std::vector<uint8_t> data(box_bytes(map));
  for (uint32_t i = 0; i < data.size(); i += 16)
    memcpy(&data[i], &block.shared[swizzle(offset + i, map.swizzle)], 16);
  return data;
}

template <class T>
void add(char* to, const uint8_t* from, int count) {
  for (int i = 0; i < count; i++) {
    T a, b;
    memcpy(&a, to + i * sizeof(T), sizeof(T));
    memcpy(&b, from + i * sizeof(T), sizeof(T));
    a += b;
    memcpy(to + i * sizeof(T), &a, sizeof(T));
  }
}

// Beyond the alignment, two rules that an H200 enforces by an illegal-instruction fault: a box starts at a multiple
// of 16 bytes along the innermost dimension, and a store does not start before the tensor does.
void check_box(const Map& map, SharedAddress s, const int* at, bool store) {
  if (int64_t(at[0]) * map.element_bytes % 16)
    fail("misaligned", "the box starts at element %d, %lld bytes into the row: not a multiple of 16", at[0],
         (long long)at[0] * map.element_bytes);
  for (int i = 0; store && i < map.rank; i++)
    if (at[i] < 0) fail("out of range", "a store starts at coordinate %d of dimension %d; only loads may", at[i], i);
  const int alignment = map.swizzle == 3 ? 1024 : map.swizzle == 2 ? 512 : map.swizzle == 1 ? 256 : 128;
  if (s.offset % alignment)
    fail("misaligned", "shared offset %u is not a multiple of %d, as this map's swizzle needs",
         s.offset - SHARED_START, alignment);
}

void send(Block& block, uint32_t offset, uint32_t bytes, uint32_t barrier, uint32_t operation,
          std::function<void()> copy) {
  check_write(block, offset, bytes, true);
  if (!mbarrier_at(block, barrier).published)
    fail("mbarrier", "the mbarrier was initialised and no fence_mbarrier_init followed");
  auto land = [&block, offset, bytes, barrier, copy] {
    copy();
    end_write(block, offset, bytes);
    note_write(block, offset, bytes, ASYNC);
    block.incoming--;
    complete_bytes(block, barrier, bytes);
  };
  begin_write(block, offset, bytes, operation);
  block.incoming++;
  Machine& m = *machine;
  if (m.lazy()) memset(&block.shared[offset], 0xee, bytes);
  if (m.mode == 0 || (m.mode == SHUFFLED && m.next_random() % 2 == 0)) land();
  else m.arrivals.push_back({land, &block, operation});
}

void enqueue(Thread& t, uint32_t offset, uint32_t bytes, uint32_t operation, std::function<void()> read,
             std::function<void()> write) {
  Block& block = *t.parent;
  check_read(block, offset, bytes, true);
  for (uint32_t c = offset / 16; c * 16 < offset + bytes; c++) {
    block.chunks[c].reads++;
    block.chunks[c].reader = operation;
  }
  Store store{read, write, {{offset / 16, (offset + bytes) / 16}}, t.store_groups};
  if (!machine->lazy()) {
    read();
    write();
    store.read = store.write = [] {};
  }
  t.stores.push_back(std::move(store));
}

void finish_read(Thread& t, Store& store) {
  if (store.has_read) return;
  store.read();
  store.has_read = true;
  for (auto [first, end] : store.chunks)
    for (uint32_t c = first; c < end; c++) {
      t.parent->chunks[c].reads--;
      note_read(*t.parent, c * 16, 16, t.linear);  // only this thread knows that they are done
    }
}

}  // namespace

void land_one() {
  auto& arrivals = machine->arrivals;
  // Latest first is the least expected order; shuffled modes take any.
  const size_t i = machine->shuffled() ? machine->next_random() % arrivals.size() : arrivals.size() - 1;
  Arrival arrival = std::move(arrivals[i]);
  arrivals.erase(arrivals.begin() + i);
  machine->landing = arrival.operation;
  arrival.land();
  machine->landing = 0;
}

void finish_stores(Thread& t, int groups, bool read_only) {
  size_t kept = 0;
  for (size_t i = 0; i < t.stores.size(); i++) {
    Store& store = t.stores[i];
    if (store.group < groups) {
      finish_read(t, store);
      if (!read_only) {
        store.write();
        continue;
      }
    }
    if (kept != i) t.stores[kept] = std::move(store);
    kept++;
  }
  t.stores.resize(kept);
}

void tma_load(uint32_t shared, const void* pointer, uint32_t barrier, uint32_t blocks, const int* at, int rank,
              Place place) {
  Thread& t = enter(blocks ? "tma_load_multicast" : "tma_load", place);
  const Map map = decode(pointer, rank);
  const uint32_t bytes = box_bytes(map);
  SharedAddress s = resolve(shared, bytes, 16), b = resolve(barrier, 8, 8);
  check_box(map, s, at, false);
  if (b.block != s.block) fail("mbarrier", "the barrier and the destination are in different blocks");
  const std::vector<int> coordinates(at, at + rank);
  const uint32_t operation = record(t.instruction, place);
  auto send_to = [&](Block& block) {
    send(block, s.offset, bytes, b.offset, operation,
         [&block, map, coordinates, s] { load_box(block, map, coordinates, s.offset); });
  };
  if (!blocks) return send_to(*s.block);
  Cluster& cluster = *t.parent->cluster;
  if ((blocks & 0xffff) >> cluster.blocks.size() || !(blocks & 0xffff))
    fail("out of range", "multicast to blocks 0x%x of a cluster of %zu", blocks & 0xffff, cluster.blocks.size());
  for (size_t r = 0; r < cluster.blocks.size(); r++) {
    if (!(blocks >> r & 1)) continue;
    if (cluster.blocks[r]->ended) fail("out of range", "multicast to block %zu of the cluster, which has ended", r);
    send_to(*cluster.blocks[r]);
  }
}

void tma_store(const void* pointer, uint32_t shared, const int* at, int rank, bool adds, Place place) {
  Thread& t = enter(adds ? "tma_reduce_add" : "tma_store", place);
  const Map map = decode(pointer, rank);
  const uint32_t bytes = box_bytes(map);
  SharedAddress s = resolve(shared, bytes, 16);
  check_box(map, s, at, true);
  if (s.block != t.parent) fail("out of range", "stores read the block's own shared memory");
  if (adds && map.data_type != INT32 && map.data_type != FLOAT32)
    fail("tensor map", "only int32 and float32 maps can be added to here");
  const std::vector<int> coordinates(at, at + rank);
  auto data = std::make_shared<std::vector<uint8_t>>();
  Block& block = *t.parent;
  auto read = [&block, map, s, data] { *data = gather_box(block, map, s.offset); };
  auto write = [map, coordinates, data, adds] {
    for_each_row(map, coordinates, 0, [&](char* to, int first, int valid, uint32_t from) {
      if (!valid) return;
      const uint8_t* source = &(*data)[from + first * map.element_bytes];
      if (!adds) memcpy(to, source, size_t(valid) * map.element_bytes);
      else if (map.data_type == FLOAT32) add<float>(to, source, valid);
      else add<uint32_t>(to, source, valid);
    });
    machine->idle_polls = 0;
  };
  enqueue(t, s.offset, bytes, record(t.instruction, place), read, write);
}

void store_wait(int pending, bool read_only, Place place) {
  Thread& t = enter(read_only ? "store_wait_read" : "store_wait", place);
  finish_stores(t, t.store_groups - pending, read_only);
}

}  // namespace emulator

using namespace emulator;

void prefetch_tensor_map(const TensorMap* map, Place place) {
  enter("prefetch_tensor_map", place);
  uint64_t magic;
  memcpy(&magic, map, sizeof magic);
  if (magic != MAGIC) fail("tensor map", "these 128 bytes are no tensor map");
}

void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier, Place place) {
  Thread& t = enter("bulk_load", place);
  if (bytes <= 0 || bytes % 16) fail("misaligned", "%d bytes; bulk copies move multiples of 16", bytes);
  SharedAddress s = resolve(shared, bytes, 16), b = resolve(barrier, 8, 8);
  if (b.block != s.block) fail("mbarrier", "the barrier and the destination are in different blocks");
  check_global(global, bytes, 16, "reads");
  Block& block = *s.block;
  send(block, s.offset, bytes, b.offset, record(t.instruction, place),
       [&block, s, global, bytes] { memcpy(&block.shared[s.offset], global, bytes); });
}

void bulk_store(void* global, uint32_t shared, int bytes, Place place) {
  Thread& t = enter("bulk_store", place);
  if (bytes <= 0 || bytes % 16) fail("misaligned", "%d bytes; bulk copies move multiples of 16", bytes);
  SharedAddress s = resolve(shared, bytes, 16);
  if (s.block != t.parent) fail("out of range", "stores read the block's own shared memory");
  check_global(global, bytes, 16, "writes");
  auto data = std::make_shared<std::vector<uint8_t>>(bytes);
  Block& block = *t.parent;
  enqueue(t, s.offset, bytes, record(t.instruction, place),
          [&block, s, data, bytes] { memcpy(data->data(), &block.shared[s.offset], bytes); },
          [data, global, bytes] { memcpy(global, data->data(), bytes); });
}

void store_commit(Place place) { enter("store_commit", place).store_groups++; }

}  // namespace qk
