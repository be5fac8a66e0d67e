/* One pass over a tensor for all of its statistics: what counting.py and channels.py do with NumPy.
 *
 * The tensor is read in slabs that stay in a core's cache. Of each, first the channels are reduced; their limits
 * say whether the exponent E still holds, and then the slab's values are counted by the keys that counting.py
 * defines. Counts and limits come out equal bit for bit to NumPy's, and do not depend on the processor: floats
 * are compared as integers, and only the order in which sums are added up is the compiler's to choose.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

/* One binary for every processor, with loops for what most servers have: the loader picks. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef CLONES
#define CLONES
#endif

/* As in counting.py. */
#define COARSE (20 * 128)
#define FINE (4 * 2048)
#define SLOTS (COARSE + FINE)
#define LINEAR 4096

/* Zeros and what lies below the keys are spread over slots by their place: a counter that is incremented again
 * before its last value has reached the cache is waited for, and half of a tensor behind a Relu is zeros. */
#define LOW 8
#define ROW (LOW + SLOTS)
/* Elements whose keys are held at a time, and elements after which a 16-bit counter could be full. */
#define BLOCK 1024
#define FULL 65535
/* Elements of a slab, if a row of channels is not longer. */
#define SLAB 8192

#define INFINITY_KEY 0x7F800000

typedef struct {
    int32_t lo, hi;
} Limits;

typedef struct {
    int exponent;
    int64_t zeros, nans, infinities;
    Limits limits; /* of the finite values */
    int64_t *below; /* (65536,) by the top 16 bits: nonzero values too small for a key; NULL before any is met */
    int failed;     /* there was no memory for it */
    int64_t totals[2 * SLOTS]; /* by sign and key */
    int uncounted; /* elements in `table` that are not in `totals` */
    int negatives; /* the second row of `table` is in use, */
    int any_negative; /* or was */
    int can_drop;
    uint16_t table[2 * ROW];
    uint16_t keys[BLOCK + 32]; /* read and written 32 at a time */
    uint32_t finite[BLOCK];
} Counts;

/* Integers that are ordered as the floats with these bits; NaN lie beyond the infinities, −0 is just below 0.
 * The same function leads back. */
static inline int32_t ordered(uint32_t bits) {
    int32_t value = (int32_t)bits;
    return value ^ ((value >> 31) & 0x7FFFFFFF);
}

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* --- counting ------------------------------------------------------------------------------------------------ */

static inline int32_t base_of(int exponent) { return (exponent - 3 + 127) << 23; }

/* Write the slot of every value; return how many of them are in the low slots, zeros apart. */
CLONES static int64_t find_keys(const uint32_t *x, int n, int exponent, uint16_t *keys, int64_t *zeros) {
    const int32_t fine = (base_of(exponent) >> 12) - COARSE - LOW;
    const int32_t coarse = (base_of(exponent) >> 16) - COARSE - LOW;
    int32_t low = 0, zero = 0;
#pragma omp simd reduction(+ : low, zero)
    for (int i = 0; i < n; i++) {
        int32_t magnitude = (int32_t)(x[i] & 0x7FFFFFFF);
        int32_t key = (magnitude >> 12) - fine, other = (magnitude >> 16) - coarse;
        key = key > other ? key : other;
        low += key < LOW;
        zero += magnitude == 0;
        key = key < LOW ? i % LOW : key;
        keys[i] = (uint16_t)(key + ((int32_t)x[i] < 0 ? ROW : 0));
    }
    *zeros += zero;
    return low - zero;
}

CLONES static void empty_row(uint16_t *row, int64_t *totals) {
    for (int i = 0; i < SLOTS; i++)
        totals[i] += row[LOW + i];
    memset(row, 0, ROW * sizeof *row);
}

static void empty_table(Counts *c) {
    empty_row(c->table, c->totals);
    if (c->negatives)
        empty_row(c->table + ROW, c->totals + SLOTS);
    c->any_negative |= c->negatives;
    c->uncounted = c->negatives = 0;
}

#if defined(__x86_64__) && defined(__GNUC__)
/* Move the keys that are not in the low slots to the front; return how many they are. Half of a tensor behind a
 * Relu is zeros: they are known by number, and need not be counted one by one. */
__attribute__((target("avx512vbmi2,avx512bw"))) static int drop_low(uint16_t *keys, int n) {
    const __m512i low = _mm512_set1_epi16(LOW), row = _mm512_set1_epi16(ROW);
    int kept = 0;
    for (int i = 0; i < n; i += 32) {
        __m512i key = _mm512_loadu_si512(keys + i);
        __mmask32 wanted = n - i < 32 ? ((__mmask32)1 << (n - i)) - 1 : ~(__mmask32)0;
        wanted &= _mm512_cmpge_epu16_mask(key, low) & _mm512_cmpge_epu16_mask(_mm512_sub_epi16(key, row), low);
        _mm512_storeu_si512(keys + kept, _mm512_maskz_compress_epi16(wanted, key));
        kept += __builtin_popcount(wanted);
    }
    return kept;
}
static int can_drop(void) { return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw"); }
#else
static int drop_low(uint16_t *keys, int n) { return (void)keys, n; }
static int can_drop(void) { return 0; }
#endif

static void add_below(Counts *c, uint32_t prefix, int64_t number) {
    if (c->below == NULL)
        c->below = calloc(1 << 16, sizeof *c->below);
    if (c->below == NULL)
        c->failed = 1;
    else
        c->below[prefix] += number;
}

static void count_below(Counts *c, const uint32_t *x, int n) {
    const int32_t lowest = (base_of(c->exponent) >> 16) - COARSE;
    for (int i = 0; i < n; i++) {
        uint32_t magnitude = x[i] & 0x7FFFFFFF;
        if (magnitude != 0 && (int32_t)(magnitude >> 16) < lowest)
            add_below(c, x[i] >> 16, 1);
    }
}

/* Count finite values below 2^(E+1). */
static void count(Counts *c, const uint32_t *x, int64_t n, int has_negative) {
    for (int64_t start = 0; start < n; start += BLOCK) {
        int size = n - start < BLOCK ? (int)(n - start) : BLOCK;
        if (c->uncounted + size > FULL)
            empty_table(c);
        c->negatives |= has_negative;
        c->uncounted += size;
        int64_t zeros = c->zeros;
        if (find_keys(x + start, size, c->exponent, c->keys, &c->zeros))
            count_below(c, x + start, size);
        if (c->zeros - zeros > size / 8 && c->can_drop)
            size = drop_low(c->keys, size);
        uint16_t *table = c->table;
        const uint16_t *keys = c->keys;
#pragma GCC unroll 16
        for (int i = 0; i < size; i++)
            table[keys[i]]++;
    }
}

/* Count again by the keys of a larger exponent what has been counted: each is a function of the one before. */
static void raise_exponent(Counts *c, int exponent) {
    empty_table(c);
    const int32_t before = base_of(c->exponent), after = base_of(exponent);
    for (int sign = 0; sign < 2; sign++) {
        int64_t *row = c->totals + sign * SLOTS;
        /* Keys only sink, so none that was moved is met again. */
        for (int key = 0; key < SLOTS; key++) {
            int64_t found = row[key];
            if (found == 0)
                continue;
            row[key] = 0;
            int32_t bits = key < COARSE ? (key - COARSE + (before >> 16)) << 16 : (key - COARSE + (before >> 12)) << 12;
            int32_t fine = (bits >> 12) - (after >> 12), coarse = (bits >> 16) - (after >> 16);
            int32_t moved = (fine > coarse ? fine : coarse) + COARSE;
            if (moved >= 0)
                row[moved] += found;
            else
                add_below(c, (uint32_t)(bits >> 16 | sign << 15), found);
        }
    }
    c->exponent = exponent;
}

/* Take in the limits of values that will be counted next. */
static void include_limits(Counts *c, Limits found) {
    if (found.lo < c->limits.lo)
        c->limits.lo = found.lo;
    if (found.hi > c->limits.hi)
        c->limits.hi = found.hi;
    int32_t below = found.lo < 0 ? (found.lo ^ 0x7FFFFFFF) & 0x7FFFFFFF : 0;
    int32_t amax = found.hi > below ? found.hi : below;
    int exponent = (amax >> 23) - 127;
    if (exponent > c->exponent)
        raise_exponent(c, exponent);
}

/* The first prefix that may occur, and how many there are from it on. */
static int32_t first_prefix(const Counts *c) { return c->below == NULL ? (base_of(c->exponent) >> 16) - COARSE : 0; }
static int32_t prefixes_of(const Counts *c) { return (base_of(c->exponent) >> 16) + FINE / 16 - first_prefix(c); }

static int64_t sum_of(const int64_t *counts, int n) {
    int64_t sum = 0;
    for (int i = 0; i < n; i++)
        sum += counts[i];
    return sum;
}

/* Add the `n` keys of an octave to linear bins: trunc(x · 2^(11−E)) is (n + key) >> shift. */
static void add_octave(const int64_t *keys, int n, int shift, int64_t *linear) {
    int run = n >> shift ? 1 << shift : n;
    for (int key = 0; key < n; key += run)
        linear[(n + key) >> shift] += sum_of(keys + key, run);
}

/* Fill the tables of a sign from zeros: `linear` of (LINEAR,), `prefixes` of (prefixes_of(c),). */
static void fill_tables(const Counts *c, int sign, int64_t *linear, int64_t *prefixes) {
    const int64_t *row = c->totals + sign * SLOTS;
    if (c->below != NULL) {
        int32_t lowest = (base_of(c->exponent) >> 16) - COARSE;
        for (int32_t prefix = 0; prefix < lowest; prefix++) {
            *prefixes++ = c->below[prefix | sign << 15];
            linear[0] += c->below[prefix | sign << 15];
        }
    }
    memcpy(prefixes, row, COARSE * sizeof *prefixes);
    for (int octave = 0; octave < COARSE / 128; octave++, row += 128)
        add_octave(row, 128, 19 - octave, linear);
    prefixes += COARSE;
    for (int i = 0; i < FINE / 16; i++)
        prefixes[i] = sum_of(row + 16 * i, 16);
    for (int octave = 0; octave < FINE / 2048; octave++, row += 2048)
        add_octave(row, 2048, 3 - octave, linear);
    if (sign == 0)
        linear[0] += c->zeros;
}

/* Count values among which some are not finite. */
static void count_mixed(Counts *c, const uint32_t *x, int64_t n) {
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t stop = n - start < BLOCK ? n : start + BLOCK;
        int finite = 0;
        Limits found = {INT32_MAX, INT32_MIN};
        for (int64_t i = start; i < stop; i++) {
            uint32_t magnitude = x[i] & 0x7FFFFFFF;
            if (magnitude < INFINITY_KEY) {
                int32_t key = ordered(x[i]);
                found.lo = key < found.lo ? key : found.lo;
                found.hi = key > found.hi ? key : found.hi;
                c->finite[finite++] = x[i];
            } else if (magnitude == INFINITY_KEY) {
                c->infinities++;
            } else {
                c->nans++;
            }
        }
        if (finite) {
            include_limits(c, found);
            count(c, c->finite, finite, found.lo < 0);
        }
    }
}

/* --- channels ------------------------------------------------------------------------------------------------ */

typedef struct {
    int32_t *lo, *hi;
    double *sum, *abs_sum;
} Channels;

CLONES static Limits limits_of(const uint32_t *x, int64_t n) {
    int32_t lo = INT32_MAX, hi = INT32_MIN;
#pragma omp simd reduction(min : lo) reduction(max : hi)
    for (int64_t i = 0; i < n; i++) {
        int32_t key = ordered(x[i]);
        lo = key < lo ? key : lo;
        hi = key > hi ? key : hi;
    }
    return (Limits){lo, hi};
}

/* Reduce `runs` runs of `n` elements, a channel each. */
CLONES static Limits reduce_runs(const uint32_t *x, int64_t runs, int64_t n, Channels c) {
    Limits all = {INT32_MAX, INT32_MIN};
    for (int64_t run = 0; run < runs; run++, x += n) {
        int32_t lo = INT32_MAX, hi = INT32_MIN;
        double sum = 0, abs_sum = 0;
#pragma omp simd reduction(min : lo) reduction(max : hi) reduction(+ : sum, abs_sum)
        for (int64_t i = 0; i < n; i++) {
            int32_t key = ordered(x[i]);
            double value = as_float(x[i]), magnitude = as_float(x[i] & 0x7FFFFFFF);
            lo = key < lo ? key : lo;
            hi = key > hi ? key : hi;
            sum += value;
            abs_sum += magnitude;
        }
        c.lo[run] = lo < c.lo[run] ? lo : c.lo[run];
        c.hi[run] = hi > c.hi[run] ? hi : c.hi[run];
        c.sum[run] += sum;
        c.abs_sum[run] += abs_sum;
        all.lo = lo < all.lo ? lo : all.lo;
        all.hi = hi > all.hi ? hi : all.hi;
    }
    return all;
}

/* Reduce `rows` rows of `channels` elements, a channel each. */
CLONES static void reduce_rows(const uint32_t *x, int64_t rows, int64_t channels, Channels c) {
    int32_t *restrict lo = c.lo, *restrict hi = c.hi;
    double *restrict sum = c.sum, *restrict abs_sum = c.abs_sum;
    for (int64_t row = 0; row < rows; row++, x += channels) {
#pragma omp simd
        for (int64_t i = 0; i < channels; i++) {
            int32_t key = ordered(x[i]);
            lo[i] = key < lo[i] ? key : lo[i];
            hi[i] = key > hi[i] ? key : hi[i];
            sum[i] += as_float(x[i]);
            abs_sum[i] += as_float(x[i] & 0x7FFFFFFF);
        }
    }
}

/* Keys become floats. NaN may lie at either end; −0 becomes 0: which of them comes first says nothing. */
static void keys_to_floats(Channels c, int64_t channels) {
    for (int64_t i = 0; i < channels; i++) {
        if (c.lo[i] < -INFINITY_KEY - 1 || c.hi[i] > INFINITY_KEY)
            c.lo[i] = c.hi[i] = 0x7FC00000;
        c.lo[i] = c.lo[i] == -1 ? 0 : ordered((uint32_t)c.lo[i]);
        c.hi[i] = c.hi[i] == -1 ? 0 : ordered((uint32_t)c.hi[i]);
    }
}

/* --- a tensor ------------------------------------------------------------------------------------------------ */

/* The values before `end` that are not counted yet, and their limits. */
typedef struct {
    const uint32_t *end;
    int64_t size;
    Limits limits;
} Slab;

static const Limits NOTHING = {INT32_MAX, INT32_MIN};

static void count_slab(Counts *c, Slab *slab) {
    const uint32_t *x = slab->end - slab->size;
    if (slab->limits.lo <= -INFINITY_KEY - 1 || slab->limits.hi >= INFINITY_KEY) {
        count_mixed(c, x, slab->size);
    } else if (slab->size) {
        include_limits(c, slab->limits);
        count(c, x, slab->size, slab->limits.lo < 0);
    }
    slab->size = 0;
    slab->limits = NOTHING;
}

/* Take in the `size` values that come next, and have these limits. */
static void extend(Slab *slab, int64_t size, Limits found, Counts *c) {
    if (c == NULL)
        return;
    if (slab->size + size > SLAB)
        count_slab(c, slab);
    slab->end += size;
    slab->size += size;
    slab->limits.lo = found.lo < slab->limits.lo ? found.lo : slab->limits.lo;
    slab->limits.hi = found.hi > slab->limits.hi ? found.hi : slab->limits.hi;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Reduce an array of shape (rows, channels, inner); either of the results may be NULL. */
static void reduce(const uint32_t *x, int64_t rows, int64_t channels, int64_t inner, const Channels *found, Counts *c) {
    Slab slab = {x, 0, NOTHING};
    int64_t n = rows * channels * inner;
    if (found == NULL) {
        for (int64_t i = 0; i < n; i += SLAB)
            extend(&slab, least(n - i, SLAB), limits_of(x + i, least(n - i, SLAB)), c);
    } else if (inner == 1) {
        int64_t step = channels < SLAB ? SLAB / channels : 1;
        for (int64_t row = 0; row < rows; row += step) {
            int64_t some = least(rows - row, step), size = some * channels;
            const uint32_t *first = x + row * channels;
            reduce_rows(first, some, channels, *found);
            if (c != NULL)
                extend(&slab, size, limits_of(first, size), c);
        }
    } else {
        int64_t step = inner < SLAB ? SLAB / inner : 1;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t channel = 0; channel < channels; channel += step)
                for (int64_t start = 0; start < inner; start += SLAB) {
                    /* More than one run only where they are whole. */
                    int64_t runs = least(channels - channel, step), size = least(inner - start, SLAB);
                    Channels here = {found->lo + channel, found->hi + channel, found->sum + channel,
                                     found->abs_sum + channel};
                    extend(&slab, runs * size, reduce_runs(x, runs, size, here), c);
                    x += runs * size;
                }
    }
    if (c != NULL) {
        count_slab(c, &slab);
        empty_table(c);
    }
}

/* --- Python -------------------------------------------------------------------------------------------------- */

/* Open a buffer of exactly `size` elements of `item` bytes; None gives NULL. */
static int open_buffer(PyObject *object, const char *name, int flags, int64_t size, size_t item, Py_buffer *view) {
    view->obj = NULL;
    view->buf = NULL;
    if (object == Py_None)
        return 0;
    if (PyObject_GetBuffer(object, view, flags) != 0)
        return -1;
    if (view->len != size * (int64_t)item) {
        PyErr_Format(PyExc_ValueError, "%s: %zd bytes, wanted %lld elements of %zu", name, view->len, (long long)size,
                     item);
        return -1;
    }
    if ((uintptr_t)view->buf % item) {
        PyErr_Format(PyExc_ValueError, "%s: not aligned", name);
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(reduce_doc,
             "reduce(x, shape, channels, linear, exponent, /)\n--\n\n"
             "Reduce float32 values, C-contiguous and aligned, of shape (rows, channels, inner).\n\n"
             "channels: None or (lo, hi, sum, abs_sum), float32 and float64 of (channels,); they are written.\n"
             "linear: None, then nothing is counted; or int64 of (2, 4096), by sign; it is written.\n"
             "exponent: E to begin with.\n"
             "Return None if nothing is counted, else (E, zeros, NaN, infinities, least, largest, positive, negative):\n"
             "the limits of the finite values, +inf and -inf where there are none, and of either sign the first\n"
             "prefix met and the bytes of an int64 for each from there to the last.");

static double float_of(int32_t key) { return key == -1 ? 0.0 : as_float(ordered((uint32_t)key)); }

/* (first, counts) of the prefixes that occur among `n` from `first` on. */
static PyObject *used_prefixes(const int64_t *prefixes, int first, int n) {
    while (n > 0 && prefixes[n - 1] == 0)
        n--;
    while (n > 0 && *prefixes == 0)
        prefixes++, first++, n--;
    return Py_BuildValue("(iy#)", n ? first : 0, (const char *)prefixes, (Py_ssize_t)(n * sizeof *prefixes));
}

static PyObject *py_reduce(PyObject *module, PyObject *args) {
    PyObject *x, *outputs[5] = {Py_None, Py_None, Py_None, Py_None, Py_None}, *channel_arrays;
    Py_ssize_t rows, channels, inner;
    int exponent;
    (void)module;
    if (!PyArg_ParseTuple(args, "O(nnn)OOi", &x, &rows, &channels, &inner, &channel_arrays, &outputs[4], &exponent))
        return NULL;
    if (channel_arrays != Py_None &&
        !PyArg_ParseTuple(channel_arrays, "OOOO", &outputs[0], &outputs[1], &outputs[2], &outputs[3]))
        return NULL;
    if (rows < 1 || channels < 1 || inner < 1 || rows > INT64_MAX / 8 / channels / inner || exponent < -100 ||
        exponent > 127) {
        PyErr_SetString(PyExc_ValueError, "an empty or endless shape, or an exponent beyond -100 to 127");
        return NULL;
    }

    static const char *const names[5] = {"lo", "hi", "sum", "abs_sum", "linear"};
    const int64_t sizes[5] = {channels, channels, channels, channels, 2 * LINEAR};
    const size_t items[5] = {4, 4, 8, 8, 8};
    Py_buffer input = {0}, views[5] = {{0}};
    Counts *c = NULL;
    int64_t *prefixes = NULL;
    PyObject *result = NULL;
    if (open_buffer(x, "x", PyBUF_C_CONTIGUOUS, (int64_t)rows * channels * inner, 4, &input) != 0)
        goto done;
    for (int i = 0; i < 5; i++)
        if (open_buffer(outputs[i], names[i], PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE, sizes[i], items[i], &views[i]) != 0)
            goto done;
    Channels found = {views[0].buf, views[1].buf, views[2].buf, views[3].buf};
    int64_t *linear = views[4].buf;
    if (linear != NULL) {
        c = calloc(1, sizeof *c);
        if (c == NULL) {
            PyErr_NoMemory();
            goto done;
        }
        c->exponent = exponent;
        c->limits = NOTHING;
        c->can_drop = can_drop();
    }

    Py_BEGIN_ALLOW_THREADS
    if (found.lo != NULL) {
        for (int64_t i = 0; i < channels; i++) {
            found.lo[i] = NOTHING.lo;
            found.hi[i] = NOTHING.hi;
            found.sum[i] = found.abs_sum[i] = 0;
        }
    }
    reduce(input.buf, rows, channels, inner, found.lo != NULL ? &found : NULL, c);
    if (found.lo != NULL)
        keys_to_floats(found, channels);
    if (c != NULL) {
        prefixes = calloc(2 * (size_t)prefixes_of(c), sizeof *prefixes);
        memset(linear, 0, 2 * LINEAR * sizeof *linear);
        for (int sign = 0; prefixes != NULL && sign <= c->any_negative; sign++)
            fill_tables(c, sign, linear + sign * LINEAR, prefixes + sign * prefixes_of(c));
    }
    Py_END_ALLOW_THREADS

    if (c == NULL) {
        result = Py_NewRef(Py_None);
    } else if (c->failed || prefixes == NULL) {
        PyErr_NoMemory();
    } else {
        int any = c->limits.lo <= c->limits.hi;
        result = Py_BuildValue("(iLLLddNN)", c->exponent, (long long)c->zeros, (long long)c->nans,
                               (long long)c->infinities, any ? float_of(c->limits.lo) : Py_HUGE_VAL,
                               any ? float_of(c->limits.hi) : -Py_HUGE_VAL, used_prefixes(prefixes, first_prefix(c), prefixes_of(c)),
                               used_prefixes(prefixes + prefixes_of(c), first_prefix(c), prefixes_of(c)));
    }
done:
    if (c != NULL)
        free(c->below);
    free(c);
    free(prefixes);
    if (input.obj != NULL)
        PyBuffer_Release(&input);
    for (int i = 0; i < 5; i++)
        if (views[i].obj != NULL)
            PyBuffer_Release(&views[i]);
    return result;
}

static PyMethodDef methods[] = {{"reduce", py_reduce, METH_VARARGS, reduce_doc}, {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot slots[] = {
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "Statistics of a tensor in one pass.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
