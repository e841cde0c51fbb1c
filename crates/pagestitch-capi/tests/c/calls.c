/* Every call with good arguments. Its arguments: the server (pool, inline, eager, best), a folder, and valgrind, which
 * refuses second mappings of shared memory. */
#include "test.h"
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };

struct pattern {
    int released;
};

static int read_pattern(void *ctx, uint64_t offset, void *into, size_t count) {
    (void)ctx;
    for (size_t i = 0; i < count; i++)
        ((unsigned char *)into)[i] = (unsigned char)((offset + i) / 100);
    return 0;
}

static void release_pattern(void *ctx) { ((struct pattern *)ctx)->released++; }

static ps_server *server_of(const char *name) {
    ps_server *server = NULL;
    if (!strcmp(name, "inline"))
        OK(ps_server_inline(&server));
    else if (!strcmp(name, "eager"))
        OK(ps_server_eager(&server));
    else if (!strcmp(name, "best"))
        OK(ps_server_best(&server));
    else {
        ps_pool_options options;
        memset(&options, 0, sizeof options);
        options.size = sizeof options;
        options.workers = 2;
        options.warn_after_ms = 30000;
        OK(ps_server_pool(&options, &server));
    }
    return server;
}

static void memory_and_holes(ps_server *server) {
    char head[5000], tail[300];
    memset(head, 'h', sizeof head), memset(tail, 't', sizeof tail);
    ps_builder *builder;
    ps_region *region;
    OK(ps_builder_new(&builder));
    OK(ps_builder_name(builder, "pieces"));
    OK(ps_builder_writable(builder));
    OK(ps_add_memory(builder, head, sizeof head));
    OK(ps_add_hole(builder, 10000));
    OK(ps_add_memory(builder, tail, sizeof tail));
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    CHECK(ps_region_bytes(region) == 15300);
    const char *base = (const char *)ps_region_data(region);
    CHECK(base[0] == 'h' && base[4999] == 'h' && base[5000] == 0 && base[15000] == 't' && base[15299] == 't');
    OK(ps_region_write(region, 4998, "written", 7));
    char back[9];
    OK(ps_region_read(region, 4997, back, sizeof back));
    CHECK(!memcmp(back, "hwritten\0", 9) && head[4999] == 'h');
    ((char *)ps_region_data_mut(region))[0] = 'X';
    CHECK(base[0] == 'X');
    OK(ps_region_populate(region, 0, PS_TO_END));
    OK(ps_region_retry_failed(region, 0, PS_TO_END));
    size_t bytes;
    char plan[4000];
    OK(ps_region_plan(region, NULL, 0, &bytes));
    CHECK(bytes > 20);
    OK(ps_region_plan(region, plan, sizeof plan, &bytes));
    CHECK(strlen(plan) == bytes && strstr(plan, "memory"));
    OK(ps_region_plan(region, plan, 5, NULL));
    CHECK(strlen(plan) == 4);
    uint64_t value;
    for (size_t i = 0; ps_metric_name(i); i++)
        OK(ps_region_metric(region, ps_metric_name(i), &value));
    OK(ps_region_free(region));
}

static void own_source(ps_server *server) {
    struct pattern state = { 0 };
    ps_source source;
    memset(&source, 0, sizeof source);
    source.size = sizeof source;
    source.ctx = &state;
    source.bytes = 20000;
    source.read_at = read_pattern;
    source.release = release_pattern;
    source.granularity = 2 * PAGE;
    source.name = "pattern";
    ps_builder *builder;
    ps_region *region;
    OK(ps_builder_new(&builder));
    OK(ps_add_source(builder, &source));
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    OK(ps_region_prefetch(region, 0, PAGE));
    const unsigned char *base = (const unsigned char *)ps_region_data(region);
    for (size_t i = 0; i < 20000; i += 777)
        CHECK(base[i] == (unsigned char)(i / 100));
    OK(ps_region_free(region));
    CHECK(state.released == 1);
}

static void files(ps_server *server, const char *folder) {
    char path[500];
    snprintf(path, sizeof path, "%s/pagestitch-calls-XXXXXX", folder);
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    char bytes[3 * PAGE];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (char)(i / 50);
    CHECK(write(fd, bytes, sizeof bytes) == (ssize_t)sizeof bytes);
    ps_builder *builder;
    ps_region *region;
    OK(ps_builder_new(&builder));
    OK(ps_builder_page_aligned(builder));
    OK(ps_builder_writable(builder));
    OK(ps_add_file(builder, path, 100, 200));
    OK(ps_add_file_in_place(builder, path, PAGE, PS_TO_END));
    OK(ps_add_fd(builder, fd, 0, PAGE));
    OK(ps_add_fd(builder, fd, PAGE + 300, 500));
    OK(ps_builder_build(builder, server, &region));
    const char *base = (const char *)ps_region_data(region);
    CHECK(!memcmp(base, bytes + 100, 200) && base[200] == 0);
    /* A part in place keeps its offset within a page. */
    const uint64_t starts[] = { 0, PAGE, 3 * PAGE, 4 * PAGE + 300 };
    uint64_t start;
    for (size_t chunk = 0; chunk < 4; chunk++) {
        OK(ps_region_offset_of(region, chunk, &start));
        CHECK(start == starts[chunk]);
    }
    CHECK(!memcmp(base + start, bytes + PAGE + 300, 500));
    FAILS(ps_region_write(region, start - 1, "no", 2), PS_OUT_OF_RANGE, "ps_region_offset_of()");
    CHECK(!memcmp(base + PAGE, bytes + PAGE, 2 * PAGE) && !memcmp(base + 3 * PAGE, bytes, PAGE));
    OK(ps_region_write(region, 3 * PAGE, "shown", 5));
    char back[5];
    CHECK(pread(fd, back, 5, 0) == 5 && !memcmp(back, "shown", 5));
    OK(ps_region_free(region));
    /* The builder is empty, and makes another region. */
    OK(ps_builder_require_zero_copy(builder));
    OK(ps_add_fd(builder, fd, PAGE, PAGE));
    OK(ps_builder_build(builder, server, &region));
    CHECK(!memcmp(ps_region_data(region), bytes + PAGE, PAGE));
    OK(ps_region_free(region));
    OK(ps_builder_free(builder));
    close(fd), unlink(path);
}

static void one_memfd_twice(ps_server *server) {
    int fd = memfd_create("ring", 0);
    CHECK(fd >= 0 && !ftruncate(fd, 2 * PAGE));
    ps_extent parts[] = { { 0, PS_TO_END }, { 0, 2 * PAGE } };
    ps_region *ring;
    OK(ps_region_of_memfd(server, fd, parts, 2, &ring));
    OK(ps_region_write(ring, 2 * PAGE - 2, "seam", 4));
    CHECK(!memcmp(ps_region_data(ring), "am", 2));
    OK(ps_region_free(ring));
    close(fd);
}

static void a_shared_mapping(ps_server *server) {
    char *shared = (char *)mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    ps_builder *builder;
    ps_region *region;
    OK(ps_builder_new(&builder));
    OK(ps_add_alias(builder, shared, PAGE));
    OK(ps_builder_build(builder, server, &region));
    memcpy(shared, "seen", 4);
    CHECK(!memcmp(ps_region_data(region), "seen", 4));
    OK(ps_region_free(region));
    OK(ps_builder_free(builder));
    munmap(shared, PAGE);
}

/* A region of four times its budget. */
static void bounded(ps_server *server) {
    enum { BYTES = 64 << 20 };
    char *bytes = (char *)malloc(BYTES);
    for (size_t i = 0; i < BYTES; i += PAGE)
        memset(bytes + i, (int)(i / PAGE % 251), PAGE);
    ps_budget *budget;
    ps_builder *builder;
    ps_region *region;
    OK(ps_budget_new(16 << 20, &budget));
    OK(ps_builder_new(&builder));
    OK(ps_builder_budget(builder, budget));
    OK(ps_add_memory(builder, bytes, BYTES));
    OK(ps_builder_build(builder, server, &region));
    const char *base = (const char *)ps_region_data(region);
    for (size_t i = 0; i < BYTES; i += PAGE)
        CHECK(base[i] == (char)(i / PAGE % 251));
    CHECK(base[0] == 0 && ps_budget_resident(budget) <= 16 << 20);
    OK(ps_region_free(region));
    OK(ps_builder_free(builder));
    OK(ps_budget_free(budget));
    free(bytes);
}

/* Memory is added at the end, and the addresses stay. */
static void growing(ps_server *server) {
    ps_builder *builder;
    ps_region *region;
    uint64_t offset = 0;
    OK(ps_builder_new(&builder));
    OK(ps_builder_capacity(builder, 1 << 20));
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    const void *start = ps_region_data(region);
    OK(ps_region_append(region, "first,", 6, NULL));
    OK(ps_region_append(region, "second", 6, &offset));
    CHECK(offset == 6 && ps_region_bytes(region) == 12 && ps_region_data(region) == start);
    CHECK(!memcmp(start, "first,second", 12));
    OK(ps_region_free(region));
}

struct change {
    uint64_t count, offset, bytes;
};

static void add_change(void *ctx, uint64_t offset, uint64_t bytes) {
    struct change *change = (struct change *)ctx;
    change->count++, change->offset = offset, change->bytes = bytes;
}

/* The pages that were written, as a snapshot of a guest has them. */
static void changes(ps_server *server) {
    ps_builder *builder;
    ps_region *region;
    OK(ps_builder_new(&builder));
    OK(ps_builder_writable(builder));
    OK(ps_builder_track_changes(builder));
    OK(ps_add_hole(builder, 10 * PAGE));
    int status = ps_builder_build(builder, server, &region);
    OK(ps_builder_free(builder));
    if (status == PS_UNSUPPORTED)
        return; /* Linux before 6.7 */
    OK(status);
    struct change change = { 0, 0, 0 };
    ((char *)ps_region_data_mut(region))[5 * PAGE + 3] = 'w';
    OK(ps_region_changes(region, add_change, &change));
    CHECK(change.count == 1 && change.offset == 5 * PAGE && change.bytes == PAGE);
    OK(ps_region_write(region, 0, "diff", 4));
    int fd = memfd_create("diff", 0);
    char diff[5];
    OK(ps_region_save_changes(region, fd));
    CHECK(pread(fd, diff, 5, 0) == 5 && !memcmp(diff, "diff", 5));
    OK(ps_region_free(region));
    close(fd);
}

/* A child has the region, if it inherits it. */
static void forked(ps_server *server) {
    ps_builder *builder;
    ps_region *region;
    char bytes[] = "of the parent";
    OK(ps_builder_new(&builder));
    OK(ps_builder_inherit_on_fork(builder));
    OK(ps_add_memory(builder, bytes, sizeof bytes));
    int status = ps_builder_build(builder, server, &region);
    OK(ps_builder_free(builder));
    if (status == PS_PERMISSION_DENIED || status == PS_UNSUPPORTED)
        return; /* no CAP_SYS_PTRACE, or Linux before 6.6 */
    OK(status);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        _exit(strcmp((const char *)ps_region_data(region), "of the parent") ? 1 : 0);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    OK(ps_region_free(region));
}

int main(int argc, char **argv) {
    CHECK(argc >= 3 && ps_abi_version() == PS_ABI_VERSION);
    CHECK(!strcmp(ps_last_error(), "") && ps_last_errno() == 0);
    ps_server *server = server_of(argv[1]);
    memory_and_holes(server);
    if (strcmp(argv[1], "inline"))
        own_source(server);
    if (!strcmp(argv[1], "pool"))
        bounded(server), growing(server), changes(server), forked(server);
    files(server, argv[2]);
    one_memfd_twice(server);
    if (argc == 3)
        a_shared_mapping(server);
    char byte = 'x';
    ps_piece piece = { &byte, 1 };
    ps_region *last;
    OK(ps_region_of_pieces(server, &piece, 1, &last));
    OK(ps_server_free(server));
    /* A region keeps its server running. */
    CHECK(*(const char *)ps_region_data(last) == 'x');
    OK(ps_region_free(last));
    return 0;
}
