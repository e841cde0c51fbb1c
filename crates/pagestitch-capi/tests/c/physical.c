/* Physical memory, in a guest whose /dev/mem maps any page. The argument is the address of reserved memory. */
#include "test.h"
#include <sys/mman.h>

enum { PAGE = 4096, PAGES = 64 };

static ps_server *server;

static uint64_t metric(const ps_region *region, const char *name) {
    uint64_t value;
    OK(ps_region_metric(region, name, &value));
    return value;
}

/* Frees a region that has shown all its pages without a fault and without a copy. */
static void end(ps_region *region, uint64_t pages) {
    CHECK(metric(region, "pages_in_place") == pages);
    CHECK(metric(region, "faults") == 0 && metric(region, "bytes_copied") == 0);
    OK(ps_region_free(region));
}

static ps_builder *writable(void) {
    ps_builder *builder;
    OK(ps_builder_new(&builder));
    OK(ps_builder_writable(builder));
    return builder;
}

static ps_region *built(ps_builder *builder) {
    ps_region *region;
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    return region;
}

/* Two regions show the same reserved memory. */
static void reserved(uint64_t address) {
    ps_region *regions[2];
    for (int number = 0; number < 2; number++) {
        ps_builder *builder = writable();
        OK(ps_add_physical(builder, address + PAGE, PAGE));
        OK(ps_add_physical(builder, address, PAGE));
        regions[number] = built(builder);
    }
    OK(ps_region_write(regions[0], PAGE - 3, "behind", 6));
    const char *other = (const char *)ps_region_data(regions[1]);
    CHECK(!memcmp(other + PAGE - 3, "behind", 6));
    end(regions[0], 2);
    end(regions[1], 2);
}

/* Memory whose pages have their numbers as bytes. */
static unsigned char *numbered(void) {
    void *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    for (int page = 0; page < PAGES; page++)
        memset((char *)memory + page * PAGE, page + 1, PAGE);
    return (unsigned char *)memory;
}

/* A region shows the pages of this process backwards, also what is written to them later. */
static void frames_of_pieces(void) {
    unsigned char *memory = numbered();
    ps_piece pieces[PAGES];
    for (int page = 0; page < PAGES; page++) {
        ps_piece last = { memory + (PAGES - 1 - page) * PAGE, PAGE };
        pieces[page] = last;
    }
    ps_region *region;
    OK(ps_region_of_frames(server, pieces, PAGES, &region));
    const volatile unsigned char *shown = (const volatile unsigned char *)ps_region_data(region);
    for (int page = 0; page < PAGES; page++)
        CHECK(shown[page * PAGE + 7] == PAGES - page);
    ((volatile unsigned char *)memory)[5] = 200;
    CHECK(shown[(PAGES - 1) * PAGE + 5] == 200);
    end(region, PAGES);
    CHECK(!munmap(memory, PAGES * PAGE));
}

/* Writes to a region are writes to the memory that it shows. */
static void frames_are_written(void) {
    unsigned char *memory = numbered();
    ps_builder *builder = writable();
    OK(ps_add_frames(builder, memory + PAGE, (PAGES - 1) * PAGE));
    OK(ps_add_frames(builder, memory, PAGE));
    ps_region *region = built(builder);
    OK(ps_region_write(region, (PAGES - 1) * PAGE - 2, "over", 4));
    CHECK(!memcmp(memory + PAGES * PAGE - 2, "ov", 2) && !memcmp(memory, "er", 2));
    end(region, PAGES);
    CHECK(!munmap(memory, PAGES * PAGE));
}

int main(int count, char **arguments) {
    CHECK(count == 2);
    OK(ps_server_best(&server));
    reserved(strtoull(arguments[1], NULL, 0));
    frames_of_pieces();
    frames_are_written();
    OK(ps_server_free(server));
    puts("physical memory and page frames are shown without a copy");
    return 0;
}
