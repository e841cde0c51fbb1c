/* Every kind of wrong argument is an error that names the thing. */
#include "test.h"
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static char told[200];

static int broken(void *ctx, uint64_t offset, void *into, size_t count) {
    (void)offset, (void)into, (void)count;
    return *(int *)ctx;
}

static void tell(void *ctx, uint64_t offset, const char *reason) {
    (void)ctx;
    snprintf(told, sizeof told, "%d: %s", (int)offset, reason);
}

static void changed(void *ctx, uint64_t offset, uint64_t bytes) { (void)ctx, (void)offset, (void)bytes; }

static void servers(void) {
    ps_server *server;
    ps_budget *budget;
    FAILS(ps_budget_new(0, &budget), PS_INVALID_OPTION, "");
    FAILS(ps_server_best(NULL), PS_INVALID_ARGUMENT, "null pointer");
    FAILS(ps_server_fd(NULL), PS_INVALID_ARGUMENT, "server");
    ps_pool_options options;
    memset(&options, 0, sizeof options);
    FAILS(ps_server_pool(&options, &server), PS_INVALID_ARGUMENT, "sizeof");
    options.size = sizeof options + 8;
    FAILS(ps_server_pool(&options, &server), PS_INVALID_ARGUMENT, "sizeof");
    options.size = sizeof options;
    options.workers = 100000000;
    CHECK(ps_server_pool(&options, &server) < 0 && *ps_last_error());
    OK(ps_server_free(NULL));
    OK(ps_server_eager(&server));
    FAILS(ps_server_serve(server, 1, NULL), PS_INVALID_ARGUMENT, "ps_server_manual");
    OK(ps_server_free(server));
}

/* Later use of a freed handle is undefined, and found in builds with debug assertions. */
static void freed_handles(ps_server *server) {
#ifdef DEBUG_ASSERTIONS
    ps_builder *builder;
    ps_region *region;
    ps_budget *budget;
    OK(ps_builder_new(&builder));
    FAILS(ps_region_populate((ps_region *)builder, 0, 1), PS_INVALID_HANDLE, "is a builder");
    OK(ps_add_hole(builder, 1));
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    FAILS(ps_builder_free(builder), PS_INVALID_HANDLE, "builder was freed");
    FAILS(ps_builder_writable(builder), PS_INVALID_HANDLE, "builder was freed");
    OK(ps_region_free(region));
    FAILS(ps_region_free(region), PS_INVALID_HANDLE, "region was freed");
    CHECK(!ps_region_data(region) && !ps_region_bytes(region));
    OK(ps_budget_new(1 << 24, &budget));
    OK(ps_budget_free(budget));
    FAILS(ps_budget_free(budget), PS_INVALID_HANDLE, "budget was freed");
    FAILS(ps_budget_free((ps_budget *)&budget), PS_INVALID_HANDLE, "no call has made");
    /* Later handles do not revive an earlier one. */
    ps_builder *later[50];
    for (int i = 0; i < 50; i++)
        OK(ps_builder_new(&later[i]));
    FAILS(ps_builder_writable(builder), PS_INVALID_HANDLE, "builder was freed");
    FAILS(ps_builder_free(builder), PS_INVALID_HANDLE, "builder was freed");
    for (int i = 0; i < 50; i++)
        OK(ps_builder_free(later[i]));
#else
    (void)server;
#endif
}

static void chunks(ps_server *server) {
    ps_builder *builder;
    ps_region *region = NULL;
    char byte = 'x';
    OK(ps_builder_new(&builder));
    FAILS(ps_builder_build(builder, server, &region), PS_NO_CHUNKS, "chunk");
    FAILS(ps_builder_build(builder, server, NULL), PS_INVALID_ARGUMENT, "null pointer");
    FAILS(ps_builder_build(NULL, server, &region), PS_INVALID_ARGUMENT, "builder");
    FAILS(ps_builder_name(builder, NULL), PS_INVALID_ARGUMENT, "name");
    FAILS(ps_builder_on_page_failure(builder, NULL, NULL), PS_INVALID_ARGUMENT, "NULL");
    FAILS(ps_add_memory(builder, NULL, 5), PS_INVALID_ARGUMENT, "null pointer");
    FAILS(ps_add_memory(builder, &byte, SIZE_MAX), PS_INVALID_ARGUMENT, "address space");
    FAILS(ps_add_file(builder, "/nowhere/at/all", 0, 1), PS_IO, "/nowhere/at/all");
    CHECK(ps_last_errno() == ENOENT);
    FAILS(ps_add_file(builder, NULL, 0, 1), PS_INVALID_ARGUMENT, "path");
    FAILS(ps_add_file(builder, "/", 0, 1), PS_UNUSABLE_FILE, "/");
    FAILS(ps_add_fd(builder, -1, 0, 1), PS_INVALID_ARGUMENT, "-1");
    FAILS(ps_add_fd(builder, 999999, 0, 1), PS_IO, "descriptor 999999");
    CHECK(ps_last_errno() == EBADF);
    struct rlimit limit, few;
    CHECK(!getrlimit(RLIMIT_NOFILE, &limit));
    few = limit;
    int last = dup(0);
    CHECK(last > 2);
    few.rlim_cur = (rlim_t)last + 1;
    CHECK(!setrlimit(RLIMIT_NOFILE, &few));
    FAILS(ps_add_fd(builder, 0, 0, 1), PS_LIMIT_REACHED, "ulimit -n");
    CHECK(ps_last_errno() == EMFILE);
    CHECK(!setrlimit(RLIMIT_NOFILE, &limit) && !close(last));
    FAILS(ps_add_file(builder, "/proc/self/exe", UINT64_MAX, 5), PS_INVALID_ARGUMENT, "2^64");
    FAILS(ps_add_alias(builder, &byte, 1), PS_UNUSABLE_MEMORY, "");
    FAILS(ps_add_physical(builder, UINT64_MAX, 4096), PS_INVALID_ARGUMENT, "reach 2^64");
    FAILS(ps_add_physical(builder, UINT64_MAX - 4095, 4096), PS_INVALID_ARGUMENT, "reach 2^64");
    FAILS(ps_add_source(builder, NULL), PS_INVALID_ARGUMENT, "ps_source");
    ps_source source;
    memset(&source, 0, sizeof source);
    source.size = sizeof source;
    FAILS(ps_add_source(builder, &source), PS_INVALID_ARGUMENT, "read_at");
    source.size = 3;
    FAILS(ps_add_source(builder, &source), PS_INVALID_ARGUMENT, "sizeof");
    OK(ps_add_hole(builder, 0));
    FAILS(ps_builder_build(builder, server, &region), PS_INVALID_CHUNK, "chunk 0");
    OK(ps_add_hole(builder, UINT64_MAX));
    CHECK(ps_builder_build(builder, server, &region) < 0);
    OK(ps_add_memory(builder, &byte, 1));
    OK(ps_builder_require_zero_copy(builder));
    FAILS(ps_builder_build(builder, server, &region), PS_NOT_ZERO_COPY, "chunk 0");
    OK(ps_builder_free(builder));
    FAILS(ps_region_of_pieces(server, NULL, 3, &region), PS_INVALID_ARGUMENT, "list");
    FAILS(ps_region_of_pieces(server, NULL, 0, &region), PS_NO_CHUNKS, "");
    ps_piece pieces[] = { { &byte, 1 }, { NULL, 5 } };
    FAILS(ps_region_of_pieces(server, pieces, 2, &region), PS_INVALID_ARGUMENT, "piece 1: ");
    FAILS(ps_region_of_pieces(server, pieces, SIZE_MAX, &region), PS_INVALID_ARGUMENT, " pieces, more");
    CHECK(region == NULL);
}

static void ranges(ps_server *server) {
    char bytes[5000] = "bytes", into[10];
    ps_piece piece = { bytes, sizeof bytes };
    ps_region *region;
    uint64_t value;
    OK(ps_region_of_pieces(server, &piece, 1, &region));
    FAILS(ps_region_read(region, 4995, into, 10), PS_OUT_OF_RANGE, "5000");
    FAILS(ps_region_read(region, UINT64_MAX, into, 10), PS_OUT_OF_RANGE, "");
    FAILS(ps_region_read(region, 0, NULL, 10), PS_INVALID_ARGUMENT, "buffer");
    OK(ps_region_read(region, 0, NULL, 0));
    /* A length of more than the buffer has, and than the region. */
    FAILS(ps_region_read(region, 0, into, 1 << 30), PS_OUT_OF_RANGE, "5000");
    FAILS(ps_region_append(region, bytes, 1, NULL), PS_INVALID_OPTION, "call ps_builder_capacity() before the build");
    FAILS(ps_region_changes(region, NULL, NULL), PS_INVALID_ARGUMENT, "NULL");
    FAILS(ps_region_changes(region, changed, NULL), PS_OPTION_CONFLICT, "call ps_builder_track_changes() before the build");
    FAILS(ps_region_save_changes(region, -1), PS_INVALID_ARGUMENT, "-1");
    FAILS(ps_region_write(region, 0, into, 1), PS_READ_ONLY, "call ps_builder_writable() before the build");
    FAILS(ps_region_write(region, 0, NULL, 1), PS_INVALID_ARGUMENT, "buffer");
    FAILS(ps_region_write(region, 0, into, SIZE_MAX), PS_INVALID_ARGUMENT, "18446744073709551615 bytes");
    CHECK(!ps_region_data_mut(region) && strstr(ps_last_error(), "ps_builder_writable"));
    CHECK(!ps_region_data(NULL) && strstr(ps_last_error(), "null pointer"));
    CHECK(ps_region_bytes(NULL) == 0);
    FAILS(ps_region_populate(region, 6000, 1), PS_OUT_OF_RANGE, "");
    FAILS(ps_region_metric(region, "nonsense", &value), PS_INVALID_ARGUMENT, "nonsense");
    FAILS(ps_region_offset_of(region, 1, &value), PS_OUT_OF_RANGE, "1 chunks, and no chunk 1");
    FAILS(ps_region_offset_of(region, 0, NULL), PS_INVALID_ARGUMENT, "offset");
    FAILS(ps_region_metric(region, "faults", NULL), PS_INVALID_ARGUMENT, "value");
    OK(ps_region_free(region));
}

/* Buffers that are memory of the region itself, and places that are not aligned: nothing happens. */
static void wrong_places(ps_server *server) {
    ps_builder *builder;
    ps_region *region;
    uint64_t places[2];
    uint64_t *odd = (uint64_t *)((char *)places + 1);
    OK(ps_builder_new(&builder));
    OK(ps_builder_writable(builder));
    OK(ps_builder_capacity(builder, 1 << 20));
    OK(ps_add_memory(builder, "bytes", 5));
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    char *own = (char *)ps_region_data_mut(region);
    FAILS(ps_region_read(region, 0, own + 2, 3), PS_INVALID_ARGUMENT, "memory of the region itself");
    FAILS(ps_region_write(region, 0, own + 2, 3), PS_INVALID_ARGUMENT, "memory of the region itself");
    FAILS(ps_region_append(region, "more", 4, odd), PS_INVALID_ARGUMENT, "odd address");
    CHECK(!memcmp(own, "bytes", 5) && ps_region_bytes(region) == 5);
    OK(ps_region_free(region));
}

static int set_option(ps_builder *builder, int option, const ps_budget *budget) {
    switch (option) {
    case 0: return ps_builder_writable(builder);
    case 1: return ps_builder_budget(builder, budget);
    case 2: return ps_builder_inherit_on_fork(builder);
    case 3: return ps_builder_track_changes(builder);
    case 4: return ps_builder_capacity(builder, 1 << 20);
    case 5: return ps_builder_require_zero_copy(builder);
    default: return ps_builder_page_aligned(builder);
    }
}

/* All sets of options with all servers: an error names the options of C. */
static void option_conflicts(void) {
    enum { OPTIONS = 7 };
    static const char byte = 'x';
    int (*makers[])(ps_server **) = { ps_server_inline, ps_server_eager, ps_server_manual, ps_server_best };
    int refused = 0;
    ps_budget *budget;
    ps_builder *builder;
    OK(ps_budget_new(1 << 30, &budget));
    OK(ps_builder_new(&builder));
    for (int maker = 0; maker < 4; maker++) {
        ps_server *server;
        OK(makers[maker](&server));
        for (int set = 0; set < 1 << OPTIONS; set++) {
            ps_region *region = NULL;
            for (int option = 0; option < OPTIONS; option++)
                OK(set >> option & 1 ? set_option(builder, option, budget) : 0);
            OK(ps_add_memory(builder, &byte, 1));
            OK(ps_add_hole(builder, 4096));
            if (ps_builder_build(builder, server, &region)) {
                CHECK(has_names_of_c(ps_last_error()) && !strstr(ps_last_error(), "write_back"));
                refused++;
            }
            OK(ps_region_free(region));
        }
        OK(ps_server_free(server));
    }
    OK(ps_builder_free(builder));
    OK(ps_budget_free(budget));
    CHECK(refused > 100);
}

/* A source that fails: an error of the calls, and SIGBUS for a touch. */
static void failing_source(ps_server *server) {
    int error = EIO;
    ps_source source;
    memset(&source, 0, sizeof source);
    source.size = sizeof source;
    source.ctx = &error;
    source.bytes = 10000;
    source.read_at = broken;
    source.name = "broken disk";
    ps_builder *builder;
    ps_region *region;
    char into[10];
    OK(ps_builder_new(&builder));
    OK(ps_add_source(builder, &source));
    OK(ps_builder_on_page_failure(builder, tell, NULL));
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    FAILS(ps_region_read(region, 5000, into, 10), PS_SOURCE_FAILED, "broken disk");
    CHECK(ps_last_errno() == EIO && strstr(told, "4096: "));
    error = -7;
    FAILS(ps_region_populate(region, 8192, 1), PS_SOURCE_FAILED, "-7");
    OK(ps_region_free(region));
}

int main(void) {
    ps_server *server;
    OK(ps_server_pool(NULL, &server));
    servers();
    freed_handles(server);
    chunks(server);
    ranges(server);
    wrong_places(server);
    option_conflicts();
    failing_source(server);
    OK(ps_server_free(server));
    return 0;
}
