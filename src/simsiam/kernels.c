/* CPU kernels for what is slow besides decoding and forward convolutions, each in one pass where torch takes a dozen.

   kernels.py compiles this file with the machine's own compiler and calls it; the callers document what it computes.
   Needs GCC or Clang. All arrays are row-major; an image's row is [W][3]. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* libgomp's GOMP_parallel: runs a function on the given number of threads, the ones that torch's operations use. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

typedef float v4 __attribute__((vector_size(16)));

#define ROWS 8    /* of a view, resized together so that the lines between both directions stay in the L1 cache */
#define RADIUS 11 /* of the blur, at most */
#define SPARE 4   /* values past a row's end that may be accessed; those before its start belong to another row */

#define ALWAYS static inline __attribute__((always_inline))

static inline v4 load4(const float *from) { v4 v; memcpy(&v, from, sizeof v); return v; }

/* Reads and writes a value, float or bfloat16. */
ALWAYS float get(const void *values, long i, long as_float) {
    if (as_float)
        return ((const float *)values)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)values)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

ALWAYS void put(void *values, long i, float value, long as_float) {
    if (as_float) {
        ((float *)values)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    ((uint16_t *)values)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* round to nearest, ties to even */
}

/* --- views ------------------------------------------------------------------------------------------------------- */

typedef struct {
    const void *images; /* rows of [width][3] each, uint8 or float */
    long batch, height, width, as_float; /* the largest height and width */
    long count, size, to_float;
    const int64_t *starts, *widths; /* [batch]: offset and width of each image */
    const float *geometry; /* [count][10]: start, length, low and high of y, then of x, flip, sigma */
    const float *colour;   /* [count][18]: a matrix for the pixels and one for the view's mean colour, 3x3 each */
    const float *range;    /* offset, lowest and highest value, 3 each */
    void *views;           /* [count][size][size][3] */
    long next, failed;
} Views;

typedef struct {
    long *first, *count;
    float *weight;
    long most;
} Taps;

typedef struct {
    Taps y, x;
    float *lines, *view, *other, *padded, *sums;
    long line, row;
} Room;

#define PERIOD 48 /* values, after which both the channel and the position in a vector repeat */

/* A pixel's three values are adjacent, so applying a 3x3 matrix takes five products with shifted rows. */
typedef struct {
    float weight[5][PERIOD], offset[PERIOD], low[PERIOD], high[PERIOD];
    int mixes;
} Colours;

static long most_taps(long source, long size, int cubic) {
    return 2 * (long)ceilf((cubic ? 2 : 1) * (source > size ? (float)source / size : 1.0f)) + 1;
}

/* The filter of a bilinear resize, or Pillow's bicubic one, at a distance from its centre. */
static float filter(float far, int cubic) {
    if (!cubic)
        return 1 - far;
    return far < 1 ? (1.5f * far - 2.5f) * far * far + 1 : ((-0.5f * far + 2.5f) * far - 4) * far + 2;
}

/* The weights of an antialiased resize, as in views.resampling. */
static void resampling(Taps *taps, long size, const float *geometry, int flip, int cubic) {
    float start = geometry[0], length = geometry[1], low = geometry[2], high = geometry[3];
    float step = length / size, scale = step > 1 ? step : 1, reach = cubic ? 2 * scale : scale;
    for (long o = 0; o < size; o++) {
        float centre = (o + 0.5f) * step, *weight = taps->weight + o * taps->most, sum = 0;
        centre = start + (flip ? length - centre : centre);
        long n = 0;
        for (float pixel = floorf(centre - reach); n < taps->most && pixel < centre + reach; pixel++) {
            float far = fabsf(pixel + 0.5f - centre);
            if (far >= reach || pixel < low || pixel >= high)
                continue;
            if (!n)
                taps->first[o] = (long)pixel;
            weight[n] = filter(far / scale, cubic);
            sum += weight[n++];
        }
        for (long t = 0; t < n; t++)
            weight[t] /= sum;
        taps->count[o] = n;
    }
}

/* The weighted sum of `taps` rows of `count` values each, as one line. */
#define LINE(name, type)                                                                                               \
    static void name(const type *rows, long stride, long taps, const float *weight, long count, float *restrict line) {\
        memset(line, 0, count * sizeof *line);                                                                         \
        for (; taps > 3; taps -= 4, weight += 4, rows += 4 * stride)                                                   \
            for (long i = 0; i < count; i++)                                                                           \
                line[i] += weight[0] * rows[i] + weight[1] * rows[stride + i] + weight[2] * rows[2 * stride + i]       \
                    + weight[3] * rows[3 * stride + i];                                                                \
        for (; taps > 0; taps--, weight++, rows += stride)                                                             \
            for (long i = 0; i < count; i++)                                                                           \
                line[i] += weight[0] * rows[i];                                                                        \
    }
LINE(line_of_bytes, uint8_t)
LINE(line_of_floats, float)

/* Resizes ROWS lines, which start at pixel `left`, to `columns` pixels each. */
static void across(const Room *room, long left, long columns, float *to) {
    const Taps *x = &room->x;
    for (long o = 0; o < columns; o++) { /* four values for a pixel's three: the next pixel overwrites the fourth */
        const float *from = room->lines + (x->first[o] - left) * 3, *weight = x->weight + o * x->most;
        v4 sums[ROWS] = {{0}};
        for (long t = 0; t < x->count[o]; t++)
            for (long r = 0; r < ROWS; r++)
                sums[r] += weight[t] * load4(from + r * room->line + t * 3);
        for (long r = 0; r < ROWS; r++)
            memcpy(to + r * room->row + o * 3, &sums[r], sizeof sums[r]);
    }
}

static inline float within(float low, float high, float value) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

/* The colour transform of a view; `mean` is the mean colour of its pixels. */
static Colours colours_of(const Views *v, long view, const double *mean) {
    Colours c = {.mixes = 0};
    for (long k = 0; k < 3; k++) {
        const float *m = v->colour + 18 * view + 3 * k, *pull = m + 9;
        float shifted[5] = {k > 1 ? m[k - 2] : 0, k > 0 ? m[k - 1] : 0, m[k], k < 2 ? m[k + 1] : 0, k < 1 ? m[k + 2] : 0};
        float own = v->range[k] + (float)(pull[0] * mean[0] + pull[1] * mean[1] + pull[2] * mean[2]);
        for (long i = k; i < PERIOD; i += 3) {
            for (long t = 0; t < 5; t++)
                c.weight[t][i] = shifted[t];
            c.offset[i] = own, c.low[i] = v->range[3 + k], c.high[i] = v->range[6 + k];
        }
        for (long t = 0; t < 5; t++)
            c.mixes |= t != 2 && shifted[t] != 0;
    }
    return c;
}

ALWAYS void colour_some(const Colours *c, const float *restrict from, long count, void *restrict to, long at,
                        long to_float, long mixes) {
    const float(*w)[PERIOD] = c->weight;
    for (long i = 0; i < count; i++) {
        float value = c->offset[i] + w[2][i] * from[i];
        if (mixes)
            value += w[0][i] * from[i - 2] + w[1][i] * from[i - 1] + w[3][i] * from[i + 1] + w[4][i] * from[i + 2];
        put(to, at + i, within(c->low[i], c->high[i], value), to_float);
    }
}

/* Transforms the colours of the rows [top, end) of a view and writes them to the output. */
static void colour(const Views *v, long view, const Colours *c, const Room *room, const float *rows, long top, long end) {
    long count = v->size * 3;
    for (long y = top; y < end; y++, rows += room->row) {
        long at = (view * v->size + y) * count, i = 0;
#define COLOUR(count)                                                                                                  \
    if (v->to_float) { if (c->mixes) colour_some(c, rows + i, count, v->views, at + i, 1, 1);                          \
        else colour_some(c, rows + i, count, v->views, at + i, 1, 0); }                                                \
    else { if (c->mixes) colour_some(c, rows + i, count, v->views, at + i, 0, 1);                                      \
        else colour_some(c, rows + i, count, v->views, at + i, 0, 0); }
        for (; i + PERIOD <= count; i += PERIOD)
            COLOUR(PERIOD)
        COLOUR(count - i)
    }
}

/* Resizes a view into the room or, if its colours are given, applies them and writes the result to the output. */
static void resize(const Views *v, long view, const Colours *colours, Room *room) {
    const Taps *y = &room->y, *x = &room->x;
    long image = view % v->batch, left = v->width, right = 0, stride = v->widths[image] * 3;
    for (long o = 0; o < v->size; o++) {
        left = x->first[o] < left ? x->first[o] : left;
        right = x->first[o] + x->count[o] > right ? x->first[o] + x->count[o] : right;
    }
    int same = right - left == v->size; /* neither scaled nor mirrored across: nothing to do there */
    for (long o = 0; o < v->size; o++)
        same &= x->count[o] == 1 && x->first[o] == left + o;
    for (long top = 0; top < v->size; top += ROWS) {
        long some = v->size - top < ROWS ? v->size - top : ROWS;
        float *rows = room->view + (colours ? 0 : top * room->row);
        for (long r = 0; r < some; r++) {
            long o = top + r, at = v->starts[image] + y->first[o] * stride + left * 3, count = (right - left) * 3;
            const float *weight = y->weight + o * y->most;
            float *line = same ? rows + r * room->row : room->lines + r * room->line;
            if (v->as_float)
                line_of_floats((const float *)v->images + at, stride, y->count[o], weight, count, line);
            else
                line_of_bytes((const uint8_t *)v->images + at, stride, y->count[o], weight, count, line);
        }
        if (!same)
            across(room, left, v->size, rows);
        if (colours)
            colour(v, view, colours, room, rows, top, top + some);
    }
}

static long reflected(long at, long size) {
    at = at < 0 ? -at : at;
    return at > size - 1 ? 2 * (size - 1) - at : at;
}

static inline void pair(float *restrict to, const float *restrict a, const float *restrict b, float weight, long count) {
    for (long i = 0; i < count; i++)
        to[i] += weight * (a[i] + b[i]);
}

/* A Gaussian of 23 pixels with reflected edges, without weights beyond 5 sigma (1e-6). */
static void blur(float sigma, long size, Room *room) {
    long wide = (long)ceilf(5 * sigma), count = size * 3, radius = size - 1 < RADIUS ? size - 1 : RADIUS;
    radius = wide < radius ? wide : radius;
    float weight[RADIUS + 1], sum = 0;
    for (long t = 0; t <= radius; t++) {
        float far = t / (sigma > 1e-3f ? sigma : 1e-3f);
        weight[t] = expf(-0.5f * far * far);
        sum += t ? 2 * weight[t] : weight[t];
    }
    for (long t = 0; t <= radius; t++)
        weight[t] /= sum;
    float *middle = room->padded + radius * 3;
    for (long y = 0; y < size; y++) {
        float *row = room->view + y * room->row;
        memcpy(middle, row, count * sizeof *row);
        for (long t = 1; t <= radius; t++) {
            memcpy(middle - t * 3, row + t * 3, 3 * sizeof *row);
            memcpy(middle + count + (t - 1) * 3, row + (size - 1 - t) * 3, 3 * sizeof *row);
        }
        float *restrict to = room->other + y * room->row;
        for (long i = 0; i < count; i++)
            to[i] = weight[0] * middle[i];
        for (long t = 1; t <= radius; t++)
            pair(to, middle - t * 3, middle + t * 3, weight[t], count);
    }
    for (long y = 0; y < size; y++) {
        const float *from = room->other;
        float *restrict to = room->view + y * room->row;
        for (long i = 0; i < count; i++)
            to[i] = weight[0] * from[y * room->row + i];
        for (long t = 1; t <= radius; t++)
            pair(to, from + reflected(y - t, size) * room->row, from + reflected(y + t, size) * room->row, weight[t], count);
    }
}

static void mean_of(const Room *room, long size, double *mean) {
    long count = size * 3;
    memset(room->sums, 0, room->row * sizeof *room->sums);
    for (long y = 0; y < size; y++)
        for (long i = 0; i < count; i++)
            room->sums[i] += room->view[y * room->row + i];
    for (long i = 0; i < count; i++)
        mean[i % 3] += room->sums[i] / ((double)size * size);
}

static void draw(void *given) {
    Views *v = given;
    long size = v->size, row = size * 3 + SPARE, line = v->width * 3 + SPARE, rows = size + ROWS;
    long y_taps = most_taps(v->height, size, 0), x_taps = most_taps(v->width, size, 0);
    long floats = SPARE + ROWS * line + 2 * rows * row + (size + 2 * RADIUS) * 3 + SPARE + row + size * (y_taps + x_taps);
    float *memory = calloc(floats, sizeof *memory);
    long *places = calloc(4 * size, sizeof *places);
    if (!memory || !places) {
        __atomic_store_n(&v->failed, 1, __ATOMIC_RELAXED);
    } else {
        Room room = {.line = line, .row = row, .lines = memory + SPARE};
        room.view = room.lines + ROWS * line, room.other = room.view + rows * row;
        room.padded = room.other + rows * row, room.sums = room.padded + (size + 2 * RADIUS) * 3 + SPARE;
        room.y = (Taps){places, places + size, room.sums + row, y_taps};
        room.x = (Taps){places + 2 * size, places + 3 * size, room.y.weight + size * y_taps, x_taps};
        for (long i; (i = __atomic_fetch_add(&v->next, 1, __ATOMIC_RELAXED)) < v->count;) {
            const float *geometry = v->geometry + 10 * i;
            resampling(&room.y, size, geometry, 0, 0);
            resampling(&room.x, size, geometry + 4, geometry[8] != 0, 0);
            int blurs = geometry[9] > 0, pulls = 0;
            for (long k = 9; k < 18; k++)
                pulls |= v->colour[18 * i + k] != 0;
            double mean[3] = {0};
            if (!blurs && !pulls) {
                Colours colours = colours_of(v, i, mean);
                resize(v, i, &colours, &room);
                continue;
            }
            resize(v, i, NULL, &room);
            if (blurs)
                blur(geometry[9], size, &room);
            if (pulls)
                mean_of(&room, size, mean);
            Colours colours = colours_of(v, i, mean);
            colour(v, i, &colours, &room, room.view, 0, size);
        }
    }
    free(memory);
    free(places);
}

/* Returns 1 if out of memory, else 0. */
int views(Parallel parallel, long threads, const void *images, long as_float, long batch, long height, long width,
          long count, long size, long to_float, const int64_t *starts, const int64_t *widths, const float *geometry,
          const float *colour, const float *range, void *views) {
    Views v = {images, batch, height, width, as_float, count, size, to_float, starts, widths, geometry, colour, range, views,
               0, 0};
    parallel(draw, &v, (unsigned)(threads < count ? threads : count), 0);
    return (int)v.failed;
}

static void round_off(const float *line, long count, uint8_t *to) {
    for (long i = 0; i < count; i++) {
        float value = line[i] + 0.5f;
        to[i] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

/* Resizes a part of an image [height][width][3] to [rows][columns][3] on the calling thread, bicubic. Like Pillow, it
   rounds to whole levels between the two directions, of which the first here is across, and also reads pixels beside
   the part. Returns 1 if out of memory, else 0. */
int reduced(const uint8_t *image, long height, long width, double top, double left, double part_height,
            double part_width, long rows, long columns, uint8_t *to) {
    long y_taps = most_taps(height, rows, 1), x_taps = most_taps(width, columns, 1), count = columns * 3;
    Room room = {.line = width * 3 + SPARE, .row = count + SPARE};
    float *memory = calloc(SPARE + ROWS * (room.line + room.row) + rows * y_taps + columns * x_taps, sizeof *memory);
    long *places = calloc(2 * (rows + columns), sizeof *places);
    uint8_t *between = malloc(height * count);
    int failed = !memory || !places || !between;
    if (!failed) {
        room.lines = memory + SPARE, room.view = room.lines + ROWS * room.line;
        room.y = (Taps){places, places + rows, room.view + ROWS * room.row, y_taps};
        room.x = (Taps){places + 2 * rows, places + 2 * rows + columns, room.y.weight + rows * y_taps, x_taps};
        resampling(&room.y, rows, (float[]){top, part_height, 0, height}, 0, 1);
        resampling(&room.x, columns, (float[]){left, part_width, 0, width}, 0, 1);
        for (long top = 0; top < height; top += ROWS) {
            long some = height - top < ROWS ? height - top : ROWS;
            for (long r = 0; r < some; r++)
                for (long i = 0; i < width * 3; i++)
                    room.lines[r * room.line + i] = image[(top + r) * width * 3 + i];
            across(&room, 0, columns, room.view);
            for (long r = 0; r < some; r++)
                round_off(room.view + r * room.row, count, between + (top + r) * count);
        }
        for (long o = 0; o < rows; o++) {
            const float *weight = room.y.weight + o * y_taps;
            line_of_bytes(between + room.y.first[o] * count, count, room.y.count[o], weight, count, room.view);
            round_off(room.view, count, to + o * count);
        }
    }
    free(memory);
    free(places);
    free(between);
    return failed;
}

/* --- batch normalisation, what is added to it, ReLU ----------------------------------------------------------------

   Values are [rows][channels], bfloat16 or float. Rows are split into chunks whose sums are added in a fixed order, so
   the result does not depend on the number of threads. Several narrow rows are processed as one of `width` values. */

#define CHUNKS 64 /* at most */
#define CHUNK 8192 /* values per chunk, at least, if there are several */
#define COLUMNS 64 /* summed together */
enum { MEAN, SCALE, SHIFT, SLOPE, BASE, VECTORS };
#define BLOCK 64   /* rows summed up in float before double takes over */

typedef struct Norm {
    long as_float, rows, channels, width, chunks, relu, threads;
    Parallel parallel;
    const void *x, *added, *y, *y_gradient; /* `added` is NULL if nothing is added */
    void *to, *to_added;                    /* y; or the gradients of x and of what was added */
    float *of[VECTORS];                     /* per-channel vectors, [width] each */
    double *sums;                           /* [chunks][2][width], then the two totals */
    void (*work)(const struct Norm *, long, long, double *);
    long next;
} Norm;

/* The work of each phase on rows [from, to), or on `count` columns from `at` on. Calls with constant arguments compile
   to specialised versions; the sums of COLUMNS columns stay in registers. */

ALWAYS void sums_of(const Norm *n, long from, long to, double *sums, long at, long count, long as_float) {
    const void *restrict x = n->x;
    const float *near = n->of[MEAN] + at; /* one value per channel: squared differences from it lose no digits */
    float sum[COLUMNS], square[COLUMNS];
    for (long start = from; start < to; start += BLOCK) {
        for (long i = 0; i < count; i++)
            sum[i] = square[i] = 0;
        for (long row = start; row < to && row < start + BLOCK; row++)
            for (long i = 0; i < count; i++) {
                float value = get(x, row * n->width + at + i, as_float) - near[i];
                sum[i] += value;
                square[i] += value * value;
            }
        for (long i = 0; i < count; i++)
            sums[at + i] += sum[i], sums[n->width + at + i] += square[i];
    }
}

ALWAYS void apply_to(const Norm *n, long from, long to, long as_float, long relu, long adds) {
    const void *restrict x = n->x, *restrict added = n->added;
    void *restrict y = n->to;
    const float *restrict scale = n->of[SCALE], *restrict shift = n->of[SHIFT];
    long width = n->width;
    for (long row = from; row < to; row++)
        for (long i = 0; i < width; i++) {
            float value = get(x, row * width + i, as_float) * scale[i] + shift[i];
            if (adds)
                value += get(added, row * width + i, as_float);
            if (relu)
                value = value < 0 ? 0 : value;
            put(y, row * width + i, value, as_float);
        }
}

ALWAYS void gradient_sums_of(const Norm *n, long from, long to, double *sums, long at, long count, long as_float,
                             long relu, long adds) {
    const void *restrict x = n->x, *restrict y = n->y, *restrict gradient = n->y_gradient;
    void *restrict to_added = n->to_added;
    const float *mean = n->of[MEAN] + at, *scale = n->of[SCALE] + at, *shift = n->of[SHIFT] + at;
    float sum[COLUMNS], product[COLUMNS];
    for (long start = from; start < to; start += BLOCK) {
        for (long i = 0; i < count; i++)
            sum[i] = product[i] = 0;
        for (long row = start; row < to && row < start + BLOCK; row++)
            for (long i = 0; i < count; i++) {
                long place = row * n->width + at + i;
                float value = get(x, place, as_float), g = get(gradient, place, as_float);
                if (relu)
                    g = (adds ? get(y, place, as_float) : value * scale[i] + shift[i]) > 0 ? g : 0;
                if (adds)
                    put(to_added, place, g, as_float);
                sum[i] += g;
                product[i] += g * (value - mean[i]);
            }
        for (long i = 0; i < count; i++)
            sums[at + i] += sum[i], sums[n->width + at + i] += product[i];
    }
}

/* If something was added, the gradient through the ReLU is known already: it is the gradient of what was added. */
ALWAYS void gradient_of(const Norm *n, long from, long to, long as_float, long relu, long adds) {
    const void *restrict x = n->x, *restrict gradient = adds ? n->to_added : n->y_gradient;
    void *restrict to_x = n->to;
    const float *restrict mean = n->of[MEAN], *restrict scale = n->of[SCALE], *restrict shift = n->of[SHIFT];
    const float *restrict slope = n->of[SLOPE], *restrict base = n->of[BASE];
    long width = n->width;
    for (long row = from; row < to; row++)
        for (long i = 0; i < width; i++) {
            long at = row * width + i;
            float value = get(x, at, as_float), g = get(gradient, at, as_float);
            if (relu && !adds)
                g = value * scale[i] + shift[i] > 0 ? g : 0;
            put(to_x, at, scale[i] * g + slope[i] * (value - mean[i]) + base[i], as_float);
        }
}

#define VERSIONS(call)                                                                                                 \
    if (n->as_float) {                                                                                                 \
        if (n->added) { if (n->relu) { call(1, 1, 1); } else { call(1, 0, 1); } }                                      \
        else { if (n->relu) { call(1, 1, 0); } else { call(1, 0, 0); } }                                               \
    } else {                                                                                                           \
        if (n->added) { if (n->relu) { call(0, 1, 1); } else { call(0, 0, 1); } }                                      \
        else { if (n->relu) { call(0, 1, 0); } else { call(0, 0, 0); } }                                               \
    }

static void sum_up(const Norm *n, long from, long to, double *sums) {
    memset(sums, 0, 2 * n->width * sizeof *sums);
    for (long at = 0; at < n->width; at += COLUMNS) {
        long left = n->width - at;
        if (left < COLUMNS)
            sums_of(n, from, to, sums, at, left, n->as_float);
        else if (n->as_float)
            sums_of(n, from, to, sums, at, COLUMNS, 1);
        else
            sums_of(n, from, to, sums, at, COLUMNS, 0);
    }
}

static void apply(const Norm *n, long from, long to, double *sums) {
    (void)sums;
#define APPLY(as_float, relu, adds) apply_to(n, from, to, as_float, relu, adds)
    VERSIONS(APPLY)
}

static void sum_gradients(const Norm *n, long from, long to, double *sums) {
    memset(sums, 0, 2 * n->width * sizeof *sums);
    for (long at = 0; at < n->width; at += COLUMNS) {
        long left = n->width - at;
#define SUM(as_float, relu, adds)                                                                                      \
    if (left < COLUMNS) gradient_sums_of(n, from, to, sums, at, left, as_float, relu, adds);                           \
    else gradient_sums_of(n, from, to, sums, at, COLUMNS, as_float, relu, adds)
        VERSIONS(SUM)
    }
}

static void differentiate(const Norm *n, long from, long to, double *sums) {
    (void)sums;
#define DIFFERENTIATE(as_float, relu, adds) gradient_of(n, from, to, as_float, relu, adds)
    VERSIONS(DIFFERENTIATE)
}

static void chunks(void *given) {
    Norm *n = given;
    for (long i; (i = __atomic_fetch_add(&n->next, 1, __ATOMIC_RELAXED)) < n->chunks;)
        n->work(n, i * n->rows / n->chunks, (i + 1) * n->rows / n->chunks, n->sums + i * 2 * n->width);
}

static void run(Norm *n, void (*work)(const Norm *, long, long, double *)) {
    n->work = work, n->next = 0;
    n->parallel(chunks, n, (unsigned)(n->threads < n->chunks ? n->threads : n->chunks), 0);
}

/* Allocates memory. Rows of fewer than 64 values are merged by two, four or eight if their number is divisible.
   Returns 0 if out of memory. */
static int begin(Norm *n) {
    long times = 1;
    while (times < 8 && times * n->channels < 64 && n->rows % (2 * times) == 0)
        times *= 2;
    n->rows /= times, n->width = times * n->channels, n->chunks = n->rows * n->width / CHUNK;
    n->chunks = n->chunks < 1 ? 1 : n->chunks > CHUNKS ? CHUNKS : n->chunks;
    float *wide = malloc(VECTORS * n->width * sizeof *wide);
    n->sums = malloc((n->chunks + 1) * 2 * n->width * sizeof *n->sums);
    for (long k = 0; k < VECTORS; k++)
        n->of[k] = wide ? wide + k * n->width : NULL;
    return wide && n->sums;
}

/* Frees memory. Returns 1 if `begin` ran out of it. */
static int end(Norm *n) {
    int failed = !n->of[0] || !n->sums;
    free(n->of[0]);
    free(n->sums);
    return failed;
}

/* Repeats a per-channel vector for every row merged into one. */
static void repeat(const Norm *n, long vector) {
    for (long i = n->channels; i < n->width; i++)
        n->of[vector][i] = n->of[vector][i - n->channels];
}

static void fill(const Norm *n, const float *values, long vector) {
    memcpy(n->of[vector], values, n->channels * sizeof *values);
    repeat(n, vector);
}

/* [channels]: the total of the first or the second of the sums. */
static const double *total(const Norm *n, long which) {
    double *restrict to = n->sums + (2 * n->chunks + which) * n->width;
    memset(to, 0, n->channels * sizeof *to);
    for (long chunk = 0; chunk < n->chunks; chunk++) {
        const double *from = n->sums + (2 * chunk + which) * n->width;
        for (long end = n->width; end > 0; end -= n->channels, from += n->channels)
            for (long c = 0; c < n->channels; c++)
                to[c] += from[c];
    }
    return to;
}

/* One of several concatenated batches, `bytes` each; NULL stays NULL. */
static void *batch(const void *first, long number, long bytes) {
    return first ? (char *)first + number * bytes : NULL;
}

/* y = norm(x) [+ added], [ReLU]; x concatenates batches of `rows` that have statistics of their own. `saved`
   [batches][4][channels] holds mean, scale, shift and 1 / std for the gradient. Returns 1 if out of memory. */
int norm_forward(Parallel parallel, long threads, long as_float, long batches, long rows, long channels, long relu,
                 const void *x, const void *added, void *y, const float *weight, const float *bias,
                 float *running_mean, float *running_var, double momentum, double eps, float *saved) {
    long bytes = rows * channels * (as_float ? sizeof(float) : sizeof(uint16_t));
    int failed = 0;
    for (long b = 0; b < batches && !failed; b++, saved += 4 * channels) {
        Norm n = {.as_float = as_float, .rows = rows, .channels = channels, .relu = relu, .threads = threads,
                  .parallel = parallel, .x = batch(x, b, bytes), .added = batch(added, b, bytes),
                  .to = batch(y, b, bytes)};
        if (begin(&n)) {
            for (long c = 0; c < channels; c++)
                n.of[MEAN][c] = get(n.x, c, as_float);
            repeat(&n, MEAN);
            run(&n, sum_up);
            const double *sum = total(&n, 0), *square = total(&n, 1);
            float *mean = saved, *scale = saved + channels, *shift = scale + channels, *inverse = shift + channels;
            for (long c = 0; c < channels; c++) {
                double off = sum[c] / rows, variance = square[c] / rows - off * off;
                variance = variance < 0 ? 0 : variance; /* NaN stays NaN */
                double middle = off + n.of[MEAN][c], one = 1 / sqrt(variance + eps);
                mean[c] = (float)middle, inverse[c] = (float)one;
                scale[c] = (float)(weight[c] * one), shift[c] = (float)(bias[c] - weight[c] * one * middle);
                running_mean[c] += (float)(momentum * (middle - running_mean[c]));
                running_var[c] += (float)(momentum * (variance * rows / (rows - 1) - running_var[c]));
            }
            fill(&n, scale, SCALE);
            fill(&n, shift, SHIFT);
            run(&n, apply);
        }
        failed = end(&n);
    }
    return failed;
}

/* The same with the running statistics. */
int norm_in_use(Parallel parallel, long threads, long as_float, long batches, long rows, long channels, long relu,
                const void *x, const void *added, void *y, const float *weight, const float *bias, const float *mean,
                const float *variance, double eps) {
    Norm n = {.as_float = as_float, .rows = batches * rows, .channels = channels, .relu = relu, .threads = threads,
              .parallel = parallel, .x = x, .added = added, .to = y};
    if (begin(&n)) {
        for (long c = 0; c < channels; c++) {
            double scale = weight[c] / sqrt(variance[c] + eps);
            n.of[SCALE][c] = (float)scale, n.of[SHIFT][c] = (float)(bias[c] - scale * mean[c]);
        }
        repeat(&n, SCALE);
        repeat(&n, SHIFT);
        run(&n, apply);
    }
    return end(&n);
}

/* The gradients of x, of what was added (NULL if nothing was), and of weight and bias. */
int norm_backward(Parallel parallel, long threads, long as_float, long batches, long rows, long channels, long relu,
                  const void *x, const void *y, const void *y_gradient, const float *saved, void *x_gradient,
                  void *added_gradient, float *weight_gradient, float *bias_gradient) {
    long bytes = rows * channels * (as_float ? sizeof(float) : sizeof(uint16_t));
    int failed = 0;
    memset(weight_gradient, 0, channels * sizeof *weight_gradient);
    memset(bias_gradient, 0, channels * sizeof *bias_gradient);
    for (long b = 0; b < batches && !failed; b++, saved += 4 * channels) {
        void *to_added = batch(added_gradient, b, bytes);
        Norm n = {.as_float = as_float, .rows = rows, .channels = channels, .relu = relu, .threads = threads,
                  .parallel = parallel, .x = batch(x, b, bytes), .added = to_added, .y = batch(y, b, bytes),
                  .y_gradient = batch(y_gradient, b, bytes), .to = batch(x_gradient, b, bytes), .to_added = to_added};
        if (begin(&n)) {
            const float *scale = saved + channels, *inverse = saved + 3 * channels;
            for (long vector = MEAN; vector <= SHIFT; vector++)
                fill(&n, saved + vector * channels, vector);
            run(&n, sum_gradients);
            const double *sum = total(&n, 0), *product = total(&n, 1);
            for (long c = 0; c < channels; c++) {
                weight_gradient[c] += (float)(product[c] * inverse[c]);
                bias_gradient[c] += (float)sum[c];
                n.of[SLOPE][c] = (float)(-scale[c] * inverse[c] * inverse[c] * product[c] / rows);
                n.of[BASE][c] = (float)(-scale[c] * sum[c] / rows);
            }
            repeat(&n, SLOPE);
            repeat(&n, BASE);
            run(&n, differentiate);
        }
        failed = end(&n);
    }
    return failed;
}

/* --- the largest values of each row ------------------------------------------------------------------------------- */

typedef struct {
    const float *values; /* [rows][columns] */
    long rows, columns, k;
    float *best;    /* [rows][k], descending */
    int64_t *which; /* [rows][k], their columns */
    long next;
} Largest;

/* Min-heap: moves the value at `at` down to its place. */
static void sink(float *best, int64_t *which, long count, long at) {
    float value = best[at];
    int64_t column = which[at];
    for (long child; (child = 2 * at + 1) < count; at = child) {
        child += child + 1 < count && best[child + 1] < best[child];
        if (best[child] >= value)
            break;
        best[at] = best[child], which[at] = which[child];
    }
    best[at] = value, which[at] = column;
}

static void largest_of(const float *values, long columns, long k, float *best, int64_t *which) {
    for (long i = 0; i < k; i++)
        best[i] = values[i], which[i] = i;
    for (long i = k / 2; i-- > 0;)
        sink(best, which, k, i);
    for (long i = k; i < columns;) {
        long end = i + 16 < columns ? i + 16 : columns;
        float least = best[0];
        int any = end < i + 16;
        if (!any)
            for (long t = 0; t < 16; t++)
                any |= values[i + t] > least;
        for (long at = i; any && at < end; at++)
            if (values[at] > best[0]) {
                best[0] = values[at], which[0] = at;
                sink(best, which, k, 0);
            }
        i = end;
    }
    for (long left = k - 1; left > 0; left--) { /* heap sort: moves the smallest to the end */
        float value = best[0];
        int64_t column = which[0];
        best[0] = best[left], which[0] = which[left];
        best[left] = value, which[left] = column;
        sink(best, which, left, 0);
    }
}

static void find_largest(void *given) {
    Largest *l = given;
    for (long i; (i = __atomic_fetch_add(&l->next, 1, __ATOMIC_RELAXED)) < l->rows;)
        largest_of(l->values + i * l->columns, l->columns, l->k, l->best + i * l->k, l->which + i * l->k);
}

void largest(Parallel parallel, long threads, const float *values, long rows, long columns, long k, float *best,
            int64_t *which) {
    Largest l = {values, rows, columns, k, best, which, 0};
    parallel(find_largest, &l, (unsigned)(threads < rows ? threads : rows), 0);
}

/* --- a convolution's weight gradient ------------------------------------------------------------------------------

   Only for processors with AMX. oneDNN takes 1.4 to 6 times as long as for the convolution itself.

   The gradient of weight (ky, kx) is the product of y's gradient, transposed, with x moved by (ky, kx). Both are copied
   into the form that the matrix units read, a few images at a time so that they stay in the cache. There, positions are
   numbered over all images in padded rows, so that a move is an offset; where y has no position its gradient is 0. (So
   a value of x that is not finite may reach the gradient of one more weight than in torch.)

   GCC does not know what memory the tile instructions read: SETTLE keeps it from moving what was written before. */

#if defined(__AMX_BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SETTLE(address) __asm__ volatile("" : : "r"(address) : "memory")
#define TILE 16      /* rows of a tile, and its columns of float or of pairs of bfloat16 */
#define WORDS 256    /* in a tile */
#define PAIRED 32    /* positions in a tile */
#define AHEAD 16     /* positions that are sent for in advance */
#define IN_CACHE (1 << 20) /* bytes of copies */
#define GROUP 128    /* channels of x that are copied together, about */
#define PARTS 16     /* of the batch, at most, whatever the number of threads: each has sums of its own */
#define OF_SUMS (1 << 21)  /* bytes of those, about */

typedef struct {
    long batch, height, width, inner, outer, k, stride, padding, rows, columns; /* rows, columns: of y */
    const uint16_t *x, *y;
    long reach;      /* largest move, in rows or columns of one phase: x[stride i + phase] */
    long high, wide; /* rows and columns of a padded image of one phase */
    long outer_tiles, inner_width;
    long parts, y_groups, x_groups; /* the tasks: a part of the batch, some channels of y, some of x */
    long tiles, channels; /* channel tiles in a group of y's, channels in one of x's */
    long size;       /* of the sums of a part */
    float *sums;     /* [parts][outer_tiles TILE][k k][inner_width] */
    float *weight;   /* [outer][k k][inner], the result */
    long next, failed;
} Gradient;

typedef struct {
    const uint16_t **rows, *zeros; /* of x or y, at each position */
    uint32_t *left;  /* [positions / PAIRED][tiles of the group][TILE channels][TILE pairs] */
    uint32_t *right; /* [stride stride phases][2][pairs][channels]: from even positions on, from odd ones on */
    long pairs;      /* in `right` */
} Copies;

typedef struct {
    const uint32_t *from; /* a channel tile of x, moved */
    float *to;            /* its sums */
} Column;

/* Rounded up. */
static long divided(long number, long by) { return (number + by - 1) / by; }

ALWAYS __m512i paired(const uint16_t *first, const uint16_t *second) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)first));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Sends for values that are read soon, in an order that the processor does not foresee. */
ALWAYS void fetch(const uint16_t *values, long n) {
    for (long i = 0; i < n; i += 32)
        _mm_prefetch((const char *)(values + i), _MM_HINT_T0);
}

ALWAYS void interleave(const uint16_t *first, const uint16_t *second, uint32_t *to, long n) {
    long i = 0;
    for (; i + TILE <= n; i += TILE)
        _mm512_storeu_si512(to + i, paired(first + i, second + i));
    for (; i < n; i++)
        to[i] = first[i] | (uint32_t)second[i] << 16;
}

/* Writes the rows as columns: first within the four quarters of a vector, then the quarters. */
ALWAYS void transpose(const __m512i row[TILE], uint32_t *to) {
    __m512i two[TILE], four[TILE];
    for (long i = 0; i < TILE; i += 2) {
        two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (long i = 0; i < TILE; i += 4)
        for (long j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + j + 2]);
            four[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + j + 2]);
        }
    for (long j = 0; j < 4; j++) { /* quarter q of four[i + j] is column 4 q + j of the rows i to i + 3 */
        __m512i even[2], odd[2];
        for (long half = 0; half < 2; half++) {
            even[half] = _mm512_shuffle_i32x4(four[8 * half + j], four[8 * half + 4 + j], 0x88);
            odd[half] = _mm512_shuffle_i32x4(four[8 * half + j], four[8 * half + 4 + j], 0xdd);
        }
        _mm512_storeu_si512(to + j * TILE, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
        _mm512_storeu_si512(to + (4 + j) * TILE, _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
        _mm512_storeu_si512(to + (8 + j) * TILE, _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
        _mm512_storeu_si512(to + (12 + j) * TILE, _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
    }
}

/* The rows of x (or y) at `count` positions from image `first` on; zeros outside. Position (i, j) is pixel
   (i step + from_row, j step + from_column). */
static void locate(const Gradient *g, const uint16_t *images, long height, long width, long channels, long first,
                   long last, long step, long from_row, long from_column, Copies *to, long count) {
    const uint16_t **at = to->rows, **end = at + count;
    for (long image = first; image < last; image++)
        for (long i = 0; i < g->high; i++) {
            long row = i * step + from_row, column = from_column;
            const uint16_t *pixel = images + ((image * height + row) * width + column) * channels;
            int inside = row >= 0 && row < height;
            for (long j = 0; j < g->wide; j++, column += step, pixel += step * channels)
                *at++ = inside && column >= 0 && column < width ? pixel : to->zeros;
        }
    while (at < end)
        *at++ = to->zeros;
}

static void copy_left(Copies *to, long from, long end, long blocks) {
    uint32_t some[TILE][TILE] = {0};
    uint32_t *tile = to->left;
    for (long block = 0; block < blocks; block++) {
        const uint16_t **rows = to->rows + block * PAIRED;
        for (long r = PAIRED; r < 2 * PAIRED && block + 1 < blocks; r++)
            fetch(rows[r] + from, end - from);
        for (long start = from; start < end; start += TILE, tile += WORDS) {
            __m512i pairs[TILE];
            for (long r = 0; r < TILE; r++)
                if (start + TILE <= end)
                    pairs[r] = paired(rows[2 * r] + start, rows[2 * r + 1] + start);
                else {
                    interleave(rows[2 * r] + start, rows[2 * r + 1] + start, some[r], end - start);
                    pairs[r] = _mm512_loadu_si512(some[r]);
                }
            transpose(pairs, tile);
        }
    }
}

/* `real` channels of x from `start` on, in rows of whole tiles. */
static void copy_right(const Gradient *g, Copies *to, long first, long last, long start, long real, long positions) {
    long channels = divided(real, TILE) * TILE;
    for (long phase = 0; phase < g->stride * g->stride; phase++) {
        long row = phase / g->stride, column = phase % g->stride;
        if (row >= g->k || column >= g->k)
            continue; /* not read */
        locate(g, g->x, g->height, g->width, g->inner, first, last, g->stride, row - g->padding, column - g->padding,
               to, positions);
        for (long odd = 0; odd < (g->reach ? 2 : 1); odd++) {
            uint32_t *right = to->right + (2 * phase + odd) * to->pairs * channels;
            for (long at = odd; at + 1 < positions; at += 2, right += channels) {
                const uint16_t **rows = to->rows + at;
                if (at + AHEAD + 1 < positions)
                    fetch(rows[AHEAD] + start, real), fetch(rows[AHEAD + 1] + start, real);
                interleave(rows[0] + start, rows[1] + start, right, real);
            }
        }
    }
}

/* One or two of y's channel tiles times one or two of x's, added up over all blocks of positions. */
ALWAYS void multiply(const Gradient *g, long two_left, long two_right, const uint32_t *left, long tiles,
                     const Column *right, long channels, long blocks, long fresh) {
    long step = g->k * g->k * g->inner_width, below = TILE * step, bytes = step * sizeof(float);
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, right[0].to, bytes);
        if (two_right) _tile_loadd(1, right[1].to, bytes);
        if (two_left) _tile_loadd(2, right[0].to + below, bytes);
        if (two_left && two_right) _tile_loadd(3, right[1].to + below, bytes);
    }
    for (long at = 0; at < blocks * TILE * channels; at += TILE * channels, left += tiles * WORDS) {
        _tile_loadd(4, left, TILE * sizeof *left);
        _tile_loadd(6, right[0].from + at, channels * sizeof *left);
        _tile_dpbf16ps(0, 4, 6);
        if (two_right) {
            _tile_loadd(7, right[1].from + at, channels * sizeof *left);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_left) {
            _tile_loadd(5, left + WORDS, TILE * sizeof *left);
            _tile_dpbf16ps(2, 5, 6);
            if (two_right) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, right[0].to, bytes);
    if (two_right) _tile_stored(1, right[1].to, bytes);
    if (two_left) _tile_stored(2, right[0].to + below, bytes);
    if (two_left && two_right) _tile_stored(3, right[1].to + below, bytes);
}

/* Adds the products of some images to the sums. `right` [count]: all moves of x's channel tiles. */
static void add_products(const Gradient *g, const uint32_t *left, long tiles, Column *right, long count, long channels,
                         long blocks, long fresh) {
    long below = TILE * g->k * g->k * g->inner_width;
    SETTLE(left);
    for (long t = 0; t < tiles; t += 2) {
        long two_left = t + 1 < tiles;
        for (long c = 0; c < count; c += 2) {
            long two_right = c + 1 < count;
#define MULTIPLY(two_left, two_right)                                                                                  \
    multiply(g, two_left, two_right, left + t * WORDS, tiles, right + c, channels, blocks, fresh)
            if (two_left) {
                if (two_right) MULTIPLY(1, 1); else MULTIPLY(1, 0);
            } else {
                if (two_right) MULTIPLY(0, 1); else MULTIPLY(0, 0);
            }
        }
        for (long c = 0; c < count; c++)
            right[c].to += 2 * below;
    }
    for (long c = 0; c < count; c++)
        right[c].to -= (tiles + 1) / 2 * 2 * below;
}

/* Images that are copied together. It decides in which order values are added, so it must not depend on the number of
   threads, as `channels` and `tiles` of a group do. */
static long images_at_once(const Gradient *g) {
    long channels = g->inner_width < GROUP ? g->inner_width : GROUP;
    long bytes = g->high * g->wide * (g->outer_tiles * TILE * 2 + channels * 4 * g->stride * g->stride);
    return bytes < IN_CACHE ? IN_CACHE / bytes : 1;
}

static int gradient_part(const Gradient *g, long part, long y_group, long x_group) {
    long first = part * g->batch / g->parts, last = (part + 1) * g->batch / g->parts;
    long from = y_group * g->tiles * TILE, to_end = from + g->tiles * TILE, end = to_end < g->outer ? to_end : g->outer;
    long tiles = divided(end - from, TILE);
    long start = x_group * g->channels, real = g->inner - start < g->channels ? g->inner - start : g->channels;
    long channels = divided(real, TILE) * TILE;
    long area = g->high * g->wide, phases = g->stride * g->stride, moves = g->k * g->k;
    long reach = g->reach * (g->wide + 1), images = images_at_once(g);
    images = images > last - first ? last - first : images;
    long blocks = divided(images * area, PAIRED), positions = blocks * PAIRED + reach + 2;
    Copies to = {.pairs = positions / 2};
    to.rows = malloc(positions * sizeof *to.rows);
    to.left = aligned_alloc(64, blocks * tiles * WORDS * sizeof *to.left);
    size_t words = phases * 2 * to.pairs * channels;
    to.right = aligned_alloc(64, words * sizeof *to.right);
    uint16_t *zeros = calloc(g->outer > g->inner ? g->outer : g->inner, sizeof *zeros);
    long count = moves * (channels / TILE);
    Column *columns = malloc(count * sizeof *columns);
    int failed = !to.rows || !to.left || !to.right || !zeros || !columns;
    if (!failed) {
        to.zeros = zeros;
        if (channels != real)
            memset(to.right, 0, words * sizeof *to.right);
        float *sums = g->sums + part * g->size + from * moves * g->inner_width + start;
        Column *column = columns;
        for (long move = 0; move < moves; move++) {
            long ky = move / g->k, kx = move % g->k, offset = ky / g->stride * g->wide + kx / g->stride;
            long phase = ky % g->stride * g->stride + kx % g->stride;
            const uint32_t *moved = to.right + ((2 * phase + offset % 2) * to.pairs + offset / 2) * channels;
            for (long at = 0; at < channels; at += TILE)
                *column++ = (Column){moved + at, sums + move * g->inner_width + at};
        }
        for (long image = first; image < last; image += images) {
            long past = image + images < last ? image + images : last;
            blocks = divided((past - image) * area, PAIRED), positions = blocks * PAIRED + reach + 2;
            locate(g, g->y, g->rows, g->columns, g->outer, image, past, 1, 0, 0, &to, blocks * PAIRED);
            copy_left(&to, from, end, blocks);
            copy_right(g, &to, image, past, start, real, positions);
            add_products(g, to.left, tiles, columns, count, channels, blocks, image == first);
        }
    }
    free(to.rows), free(to.left), free(to.right), free(zeros), free(columns);
    return failed;
}

/* Asks the system to let this process use the tiles. */
int may_multiply(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

static void gradient_parts(void *given) {
    Gradient *g = given;
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
    for (long t = 0; t < 8; t++)
        tiles.bytes[t] = 64, tiles.rows[t] = TILE;
    SETTLE(&tiles);
    _tile_loadconfig(&tiles);
    for (long i; (i = __atomic_fetch_add(&g->next, 1, __ATOMIC_RELAXED)) < g->parts * g->y_groups * g->x_groups;)
        if (gradient_part(g, i % g->parts, i / g->parts % g->y_groups, i / g->parts / g->y_groups))
            __atomic_store_n(&g->failed, 1, __ATOMIC_RELAXED);
    _tile_release();
}

static void add_parts(void *given) {
    Gradient *g = given;
    for (long i; (i = __atomic_fetch_add(&g->next, 1, __ATOMIC_RELAXED)) < g->outer;)
        for (long row = i * g->k * g->k; row < (i + 1) * g->k * g->k; row++) {
            float *restrict to = g->weight + row * g->inner;
            const float *restrict from = g->sums + row * g->inner_width;
            memcpy(to, from, g->inner * sizeof *to);
            for (long part = 1; part < g->parts; part++)
                for (long c = 0; c < g->inner; c++)
                    to[c] += from[part * g->size + c];
        }
}

/* x [batch][height][width][inner] and y's gradient [batch][rows][columns][outer] in bfloat16 -> the gradient of the
   weight, float [outer][k][k][inner]. Returns 1 if out of memory. */
int weight_gradient(Parallel parallel, long threads, long batch, long height, long width, long inner, long outer,
                    long k, long stride, long padding, long rows, long columns, const void *x, const void *y,
                    float *weight) {
    long reach = (k - 1) / stride;
    /* One column of zeros between two rows serves both, if as many are needed before a row as after it. */
    long shared = stride == 1 && 2 * padding == k - 1 ? padding : reach;
    Gradient g = {.batch = batch, .height = height, .width = width, .inner = inner, .outer = outer, .k = k,
                  .stride = stride, .padding = padding, .rows = rows, .columns = columns, .x = x, .y = y,
                  .weight = weight, .reach = reach, .high = rows + shared, .wide = columns + shared};
    g.outer_tiles = divided(outer, TILE), g.inner_width = divided(inner, TILE) * TILE;
    g.size = g.outer_tiles * TILE * k * k * g.inner_width;
    long parts = OF_SUMS / (g.size * (long)sizeof *g.sums);
    g.parts = parts < 1 ? 1 : parts > PARTS ? PARTS : parts;
    g.parts = g.parts > batch ? batch : g.parts;
    long groups = divided(2 * threads, g.parts), most = divided(inner, 2 * TILE);
    g.channels = divided(g.inner_width / TILE, groups < most ? groups : most) * TILE;
    g.x_groups = divided(inner, g.channels);
    groups = divided(groups, g.x_groups), most = divided(g.outer_tiles, 2);
    g.tiles = divided(g.outer_tiles, 2 * (groups < most ? groups : most)) * 2;
    g.y_groups = divided(g.outer_tiles, g.tiles);
    int direct = g.parts == 1 && g.size == outer * k * k * inner;
    g.sums = direct ? weight : aligned_alloc(64, g.parts * g.size * sizeof *g.sums);
    if (!g.sums)
        return 1;
    long tasks = g.parts * g.y_groups * g.x_groups;
    parallel(gradient_parts, &g, (unsigned)(threads < tasks ? threads : tasks), 0);
    if (!direct) {
        g.next = 0;
        parallel(add_parts, &g, (unsigned)threads, 0);
        free(g.sums);
    }
    return (int)g.failed;
}
#endif
