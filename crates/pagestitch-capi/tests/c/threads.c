/* Threads share handles: each call may come from any thread, at any time. */
#include "test.h"
#include <pthread.h>

enum { PAGE = 4096, PAGES = 64, BYTES = PAGES * PAGE, THREADS = 8, CHUNKS = 50 };

struct shared {
    ps_server *server;
    ps_budget *budget;
    ps_builder *builder;
    ps_region *region;
    const char *bytes;
};

/* All calls of one region, in another order in each thread. */
static void *use_the_region(void *ctx) {
    struct shared *shared = (struct shared *)ctx;
    char bytes[PAGE], plan[100];
    for (int page = 0; page < PAGES; page++) {
        uint64_t offset = (uint64_t)page * PAGE, value;
        switch (page % 4) {
        case 0: OK(ps_region_populate(shared->region, offset, PAGE)); break;
        case 1: OK(ps_region_prefetch(shared->region, offset, PAGE)); break;
        case 2: OK(ps_region_plan(shared->region, plan, sizeof plan, NULL)); break;
        default: OK(ps_region_metric(shared->region, "faults", &value));
        }
        OK(ps_region_read(shared->region, offset, bytes, PAGE));
        CHECK(!memcmp(bytes, shared->bytes + offset, PAGE));
        CHECK(!memcmp((const char *)ps_region_data(shared->region) + offset, bytes, PAGE));
        /* Errors of other threads do not reach this one. */
        FAILS(ps_region_read(shared->region, BYTES + offset, bytes, 1), PS_OUT_OF_RANGE, "offset ");
        char wrong[40];
        snprintf(wrong, sizeof wrong, "offset %llu ", (unsigned long long)(BYTES + offset));
        CHECK(strstr(ps_last_error(), wrong));
    }
    return NULL;
}

/* One builder for all. */
static void *add_chunks(void *ctx) {
    struct shared *shared = (struct shared *)ctx;
    for (int chunk = 0; chunk < CHUNKS; chunk++)
        OK(ps_add_memory(shared->builder, shared->bytes, 100));
    return NULL;
}

/* Regions of its own, with the server and budget of all. */
static void *build_and_free(void *ctx) {
    struct shared *shared = (struct shared *)ctx;
    for (int round = 0; round < 10; round++) {
        ps_builder *builder;
        ps_region *region;
        OK(ps_builder_new(&builder));
        OK(ps_builder_budget(builder, shared->budget));
        OK(ps_add_memory(builder, shared->bytes, BYTES));
        OK(ps_builder_build(builder, shared->server, &region));
        OK(ps_builder_free(builder));
        CHECK(!memcmp(ps_region_data(region), shared->bytes, BYTES));
        CHECK(ps_budget_resident(shared->budget) > 0);
        OK(ps_region_free(region));
    }
    return NULL;
}

static void in_threads(void *(*work)(void *), struct shared *shared) {
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&threads[i], NULL, work, shared));
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_join(threads[i], NULL));
}

int main(void) {
    struct shared shared;
    char *bytes = (char *)malloc(BYTES);
    for (int i = 0; i < BYTES; i++)
        bytes[i] = (char)(i / 100);
    ps_piece piece = { bytes, BYTES };
    shared.bytes = bytes;
    OK(ps_server_pool(NULL, &shared.server));
    OK(ps_region_of_pieces(shared.server, &piece, 1, &shared.region));
    OK(ps_builder_new(&shared.builder));
    OK(ps_budget_new(256 << 20, &shared.budget));
    in_threads(use_the_region, &shared);
    OK(ps_region_free(shared.region));
    in_threads(build_and_free, &shared);
    CHECK(ps_budget_resident(shared.budget) == 0);
    in_threads(add_chunks, &shared);
    OK(ps_builder_build(shared.builder, shared.server, &shared.region));
    CHECK(ps_region_bytes(shared.region) == THREADS * CHUNKS * 100);
    CHECK(!memcmp((const char *)ps_region_data(shared.region) + 100 * (THREADS * CHUNKS - 1), bytes, 100));
    OK(ps_region_free(shared.region));
    OK(ps_builder_free(shared.builder));
    OK(ps_budget_free(shared.budget));
    OK(ps_server_free(shared.server));
    free(bytes);
    return 0;
}
