/* Random calls with random arguments, right and wrong: each returns, and each error has its line. Its arguments: a seed,
 * and the number of calls. The builds with debug assertions get freed handles, too. */
#include "test.h"
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, KINDS = 4, KEPT = 4, BYTES = 5 * PAGE + 77 };

static uint64_t state;

static uint64_t any(uint64_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
}

static uint64_t number(void) {
    /* None between a MiB and the largest: a test has no use for so much memory. */
    const uint64_t odd[] = { 0, 1, 76, PAGE - 1, PAGE, PAGE + 1, BYTES, 1 << 20, INT64_MAX, UINT64_MAX - PAGE, UINT64_MAX - 1, UINT64_MAX };
    return any(3) ? odd[any(sizeof odd / sizeof *odd)] : any(2 * BYTES);
}

/* Handles of each kind, some freed or NULL. */
static void *handles[KINDS][KEPT];

static void **slot(int kind) { return &handles[kind][any(KEPT)]; }
static ps_server *server(void) { return (ps_server *)*slot(0); }
static ps_builder *builder(void) { return (ps_builder *)*slot(1); }
static ps_region *region(void) { return (ps_region *)*slot(2); }
static ps_budget *budget(void) { return (ps_budget *)*slot(3); }

static void release(int kind, void *handle) {
    switch (kind) {
    case 0: ps_server_free((ps_server *)handle); break;
    case 1: ps_builder_free((ps_builder *)handle); break;
    case 2: ps_region_free((ps_region *)handle); break;
    default: ps_budget_free((ps_budget *)handle);
    }
}

/* Frees one. A build with debug assertions finds its later uses, so it stays in its slot. */
static void release_any(int kind) {
    void **place = slot(kind);
    release(kind, *place);
#ifndef DEBUG_ASSERTIONS
    *place = NULL;
#endif
}

static char piece[BYTES], buffer[BYTES];

static const void *pointer(void) { return any(6) ? piece : any(2) ? piece + 1 : NULL; }
/* Lengths that are wrong are far too large for any memory. */
static size_t length(void) { return any(4) ? any(BYTES) : (size_t)1 << (62 + any(2)); }
static const char *text(void) { return any(5) ? "/proc/self/exe" : any(2) ? "\xff\xfe" : NULL; }

static int fails(void *ctx, uint64_t offset, void *into, size_t count) {
    (void)ctx;
    memset(into, (int)offset, count);
    return offset / PAGE % 4 == 3 ? (int)(offset % 200) - 100 : 0;
}
static void told(void *ctx, uint64_t offset, const char *reason) { (void)ctx, (void)offset, (void)reason; }
static void changed(void *ctx, uint64_t offset, uint64_t bytes) { (void)ctx, (void)offset, (void)bytes; }

static int add_source(void) {
    ps_source source;
    memset(&source, 0, sizeof source);
    source.size = any(8) ? sizeof source : (size_t)number();
    source.bytes = number();
    source.read_at = any(8) ? fails : NULL;
    source.granularity = number();
    source.name = text();
    return ps_add_source(builder(), any(9) ? &source : NULL);
}

static int make_server(void **place) {
    ps_pool_options options = { any(5) ? sizeof options : (size_t)number(), (size_t)any(3), (size_t)any(5), number(), number() };
    switch (any(4)) {
    case 0: return ps_server_inline((ps_server **)place);
    case 1: return ps_server_manual((ps_server **)place);
    case 2: return ps_server_eager((ps_server **)place);
    default: return ps_server_pool(any(4) ? &options : NULL, (ps_server **)place);
    }
}

static int options_of_a_builder(void) {
    switch (any(10)) {
    case 0: return ps_builder_name(builder(), text());
    case 1: return ps_builder_writable(builder());
    case 2: return ps_builder_page_aligned(builder());
    case 3: return ps_builder_require_zero_copy(builder());
    case 4: return ps_builder_budget(builder(), budget());
    case 5: return ps_builder_inherit_on_fork(builder());
    case 6: return ps_builder_track_changes(builder());
    case 7: return ps_builder_capacity(builder(), number());
    case 8: return ps_builder_on_page_failure(builder(), any(4) ? told : NULL, NULL);
    default: return 0;
    }
}

static int chunks_of_a_builder(int fd) {
    switch (any(9)) {
    case 0: return ps_add_memory(builder(), pointer(), length());
    case 1: return ps_add_file(builder(), text(), number(), number());
    case 2: return ps_add_file_in_place(builder(), text(), number(), number());
    case 3: return ps_add_fd(builder(), any(4) ? fd : (int)number(), number(), number());
    case 4: return ps_add_hole(builder(), number());
    case 5: return ps_add_alias(builder(), pointer(), length());
    case 6: return ps_add_frames(builder(), any(2) ? NULL : piece, (size_t)1 << 63);
    default: return add_source();
    }
}

static int calls_of_a_region(int fd) {
    uint64_t value;
    size_t bytes;
    switch (any(15)) {
    case 0: return ps_region_read(region(), number(), any(9) ? buffer : NULL, length());
    case 1: return ps_region_write(region(), number(), pointer(), any(BYTES - 1));
    case 2: return ps_region_populate(region(), number(), number());
    case 3: return ps_region_prefetch(region(), number(), number());
    case 4: return ps_region_retry_failed(region(), number(), number());
    case 5: return ps_region_plan(region(), any(5) ? buffer : NULL, any(BYTES), any(2) ? &bytes : NULL);
    case 6: return ps_region_metric(region(), any(3) ? ps_metric_name((size_t)any(100)) : text(), any(5) ? &value : NULL);
    case 7: return ps_region_changes(region(), any(5) ? changed : NULL, NULL);
    case 8: return ps_region_save_changes(region(), any(3) ? fd : -1);
    case 9: return ps_region_append(region(), piece, length(), any(2) ? &value : NULL);
    case 10: return ps_server_serve(server(), (size_t)number(), any(2) ? &bytes : NULL);
    case 11: return ps_server_fd(server());
    case 12: return ps_region_data_mut(region()) ? 0 : -1;
    case 13: return ps_region_offset_of(region(), (size_t)any(3), any(5) ? &value : NULL);
    default: return ps_region_data(region()) || ps_region_bytes(region()) || ps_budget_resident(budget()) ? 0 : -1;
    }
}

/* A new handle in a slot that is empty, or whose handle is freed first. */
static int make(int fd) {
    int kind = (int)any(KINDS);
    void **place = slot(kind), *made = NULL;
    int status;
    ps_piece pieces[2] = { { pointer(), length() }, { piece, 5 } };
    ps_extent parts[2] = { { number(), number() }, { 0, PAGE } };
    switch (kind) {
    case 0: status = make_server(any(9) ? &made : NULL); break;
    case 1: status = ps_builder_new(any(9) ? (ps_builder **)&made : NULL); break;
    case 2:
        if (any(2))
            status = ps_builder_build(builder(), server(), any(9) ? (ps_region **)&made : NULL);
        else if (any(2))
            status = ps_region_of_pieces(server(), any(9) ? pieces : NULL, any(9) ? any(3) : SIZE_MAX / 2, (ps_region **)&made);
        else
            status = ps_region_of_memfd(server(), any(5) ? fd : -1, parts, any(3), (ps_region **)&made);
        break;
    default: status = ps_budget_new(number(), any(9) ? (ps_budget **)&made : NULL);
    }
    if (made) {
        release(kind, *place);
        *place = made;
    }
    return status;
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    state = strtoull(argv[1], NULL, 10) * 2654435761u + 1;
    int fd = memfd_create("random", 0);
    CHECK(fd >= 0 && !ftruncate(fd, 8 * PAGE));
    memset(piece, 'p', sizeof piece);
    uint64_t right = 0, wrong = 0;
    for (uint64_t calls = strtoull(argv[2], NULL, 10); calls; calls--) {
        int status;
        switch (any(6)) {
        case 0: status = make(fd); break;
        case 1: status = options_of_a_builder(); break;
        case 2: status = chunks_of_a_builder(fd); break;
        case 3:
            if (!any(4))
                release_any((int)any(KINDS));
            /* fallthrough */
        default: status = calls_of_a_region(fd);
        }
        /* An error has a line in the names of C, and no call ends in a panic. */
        CHECK(status >= 0 || (strlen(ps_last_error()) > 10 && status != PS_PANIC && has_names_of_c(ps_last_error())));
        (*(status < 0 ? &wrong : &right))++;
    }
    for (int kind = 0; kind < KINDS; kind++)
        for (int i = 0; i < KEPT; i++)
            release(kind, handles[kind][i]);
    CHECK(right && wrong);
    close(fd);
    return 0;
}
